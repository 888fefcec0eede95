"""Held-out prompts that a policy answers before and after it is trained, scored by rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.handles import FineTunedHandle
from actors.reward import RewardModelActor
from alignment.config import ModelConfig, PromptDataConfig, RewardConfig
from alignment.config.preference import AnsweredPromptsConfig
from alignment.data.prompts import load_prompts
from alignment.data.split import digest, held_out_groups
from alignment.loops.evaluation import HeldOut, compare, scored_answers
from alignment.types import Prompt
from recipes import checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RuleEvaluation:
    """The prompts, checked, and the rules; without prompts it asks nothing."""

    def __init__(
        self, config: AnsweredPromptsConfig, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str | None
    ) -> None:
        """
        Raises:
            ValueError: no such prompts or functions, or a function that needs a column they do not have.
        """
        self.config = config
        self.prompts: Sequence[Prompt] = ()
        if config.source is None:
            return
        asked = PromptDataConfig(
            source=config.source,
            prompt_key=config.prompt_key,
            system_prompt=system_prompt,
            max_prompt_tokens=config.max_prompt_tokens,
            held_out=0,
        )
        every = load_prompts(asked, tokenizer).train
        if config.num_prompts > len(every):
            raise ValueError(
                f"evaluation.num_prompts: got {config.num_prompts}, expected at most the {len(every)} of "
                "evaluation.source; lower it"
            )
        out = held_out_groups(
            np.array([int(digest(prompt.id), 16) for prompt in every], np.uint64), config.num_prompts
        )
        self.prompts = [prompt for prompt, is_out in zip(every, out, strict=True) if is_out]
        # Answers that a rule cannot score are left out of its mean, however many.
        self.reward = RewardConfig(functions=config.functions, execution=config.execution, max_unscorable=1.0)
        checks.check_reward_functions(self.reward, self.prompts)

    def answers(self, policy: FineTunedHandle, *, seed: int) -> HeldOut:
        """What the policy says now, with the same random numbers every time. The rules run in processes of their own,
        as those of an online run do."""
        if not self.prompts:
            return HeldOut(answers=[], kl=0.0)
        rollouts = policy.respond(
            self.prompts, max_new_tokens=self.config.max_new_tokens, seed=None if self.config.greedy else seed
        ).result()
        scorer = RewardModelActor(model=ModelConfig(), reward=self.reward)
        scorer.setup({})
        try:
            return HeldOut(answers=scored_answers(rollouts, scorer.score(rollouts)), kl=0.0)
        finally:
            scorer.close()

    def table(self, before: HeldOut, after: HeldOut, *, seed: int) -> dict[str, dict[str, Any]]:
        """`answers/PART` of the summary; the weighted total only where several parts make it up."""
        rows = compare(before, after, seed=seed)
        if len(self.config.functions) < 2:
            rows.pop("score", None)
        return {f"answers/{name}": row for name, row in rows.items()}
