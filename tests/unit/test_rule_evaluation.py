"""Held-out prompts that a policy answers before and after, greedily or sampled, through its actor."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny_preference_runs import PreferenceRun, pair_tasks
from tiny_rounds import write_letter_prompts

from alignment import models
from alignment.config.preference import AnsweredPromptsConfig
from alignment.data.chat import decode, eos_ids_of_model, load_tokenizer
from alignment.generation import HELD_OUT_STEP, generate, sampling_seed
from recipes.rule_evaluation import RuleEvaluation

SEED, TOKENS = 5, 6


@pytest.fixture(scope="module")
def path(tiny) -> str:
    return str(tiny / "policy")


def evaluation(folder, path: str, *, greedy: bool) -> RuleEvaluation:
    settings = {
        "source": {"path": str(write_letter_prompts(folder / "prompts.jsonl"))},
        "prompt_key": "question",
        "num_prompts": 4,
        "functions": [{"name": "form:matches", "part": "letters"}],
        "max_new_tokens": TOKENS,
        "greedy": greedy,
    }
    return RuleEvaluation(AnsweredPromptsConfig.model_validate(settings), load_tokenizer(path), system_prompt=None)


@pytest.mark.parametrize("greedy", [True, False])
def test_answers_are_those_of_the_model_alone_and_the_same_every_time(tmp_path, path, greedy):
    asked = evaluation(tmp_path, path, greedy=greedy)
    run = PreferenceRun(Path(path), tmp_path / "run", pair_tasks(), run={"num_steps": 1})
    with run.stack:
        first, again, other = (asked.answers(run.role, seed=seed) for seed in (SEED, SEED, SEED + 1))
    assert first == again
    assert (first == other) is greedy
    tokenizer = load_tokenizer(path)
    samples = generate(
        models.load_causal_lm(path),
        [prompt.prompt_ids for prompt in asked.prompts],
        [sampling_seed(SEED, prompt.id, HELD_OUT_STEP, 0) for prompt in asked.prompts],
        max_new_tokens=TOKENS,
        temperature=1.0,
        stop_ids=eos_ids_of_model(tokenizer, path),
        greedy=greedy,
    )
    assert [answer.response for answer in first.answers] == [decode(tokenizer, one.response_ids) for one in samples]
    told = asked.table(first, again, seed=1)
    assert told["answers/letters"]["n"] == 4
    assert told["answers/letters"]["before"] == told["answers/letters"]["after"]


def test_two_rules_of_one_name_are_refused_with_the_config():
    """Their numbers would be one part's; the place that a person reads is that of the key."""
    settings = {"source": {"path": "prompts.jsonl"}, "functions": [{"name": "form:matches"}] * 2}
    with pytest.raises(ValidationError, match="got form:matches more than once, expected each part once") as raised:
        AnsweredPromptsConfig.model_validate(settings)
    assert raised.value.errors()[0]["loc"] == ("functions",)
