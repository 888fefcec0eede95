"""Questions with one right answer: what a model says to them, and how many are right."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.loops.offline import accuracy_report
from alignment.types import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and its answer."""

    prompt: Prompt
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Quiz:
    """Questions that no training example holds."""

    questions: Sequence[Question] = ()
    name: str = "accuracy"
    """Of the figure."""
    majority_floor: float = 0.0
    """What answering each with the answer most frequent in training gets right."""
    max_new_tokens: int = 24

    @property
    def prompts(self) -> list[Prompt]:
        return [question.prompt for question in self.questions]


def quiz_report(quiz: Quiz, answers: Sequence[str]) -> dict[str, Any]:
    """Share of right answers with its 95 % Wilson interval, and each item's 0 or 1.

    An answer is right when it is the expected one, apart from white space, width of characters and a closing full
    stop: one that goes on to say more is not.
    """
    correct = [
        float(_plain(answer) == _plain(question.answer))
        for question, answer in zip(quiz.questions, answers, strict=True)
    ]
    return accuracy_report(correct)


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split()).rstrip(".。").casefold()
