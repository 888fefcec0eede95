"""From a choice to preference pairs: the chosen title against each that was shown beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from alignment.data.chat import encode_answer, question
from alignment.feedback_log import FeedbackEvent
from alignment.types import PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FeedbackPairs:
    """Makes the pairs of events: a pure function of the event, so that a step that is taken again has the same."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        title: Callable[[str], str | None],
        liked: Callable[[str], Sequence[str] | None],
        prompt: Callable[[Sequence[str]], str],
        system_prompt: str | None = None,
        eos_ids: frozenset[int] | None = None,
    ) -> None:
        """
        Args:
            title: from an item as events name it to its title; None for an unknown one.
            liked: the titles that a user is known to like, oldest first; None for an unknown user.
            prompt: from liked titles to the question.
            system_prompt: what stands before it.
        """
        self.tokenizer, self.title, self.liked, self.prompt = tokenizer, title, liked, prompt
        self.system_prompt, self.eos_ids = system_prompt, eos_ids

    def check(self, event: FeedbackEvent) -> None:
        """Refuse what no pair can be made of.

        Raises:
            ValueError: a user or an item that is not known, items of the same title, or nothing that the user likes.
        """
        self._question(event)
        titles = [self._title(item, "shown") for item in event.shown]
        if len(set(titles)) < len(titles):
            raise ValueError("shown: got two items of the same title, expected different ones; remove one")

    def pairs(self, event: FeedbackEvent) -> list[PreferencePair]:
        """One for each item that was shown and not chosen, in the order shown. Raises as `check`."""
        messages = question(self._question(event), self.system_prompt)

        def encode(item: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
            prompt, answer = encode_answer(self.tokenizer, messages, self._title(item, "shown"), eos_ids=self.eos_ids)
            return tuple(prompt), tuple(answer)

        prompt_ids, chosen_ids = encode(event.chosen)
        return [
            PreferencePair(
                id=f"{event.id}:{number}",
                prompt_ids=prompt_ids,
                chosen_ids=chosen_ids,
                rejected_ids=encode(item)[1],
                source="feedback",
            )
            for number, item in enumerate(event.shown)
            if item != event.chosen
        ]

    def _question(self, event: FeedbackEvent) -> str:
        if event.liked is None:
            known = self.liked(event.user)
            if known is None:
                raise ValueError("user: got one that is not known, expected one of the table; say what it liked")
        else:
            known = [self._title(item, "liked") for item in event.liked]
        if not known:
            raise ValueError("liked: got nothing, expected at least one item; name one")
        return self.prompt(known)

    def _title(self, item: str, name: str) -> str:
        title = self.title(item)
        if title is None:
            raise ValueError(f"{name}: got an item that is not known, expected one of the catalogue; correct it")
        return title
