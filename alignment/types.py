"""The records that travel between stages. Each has only what its stage produced.

Ragged until the learner: actors exchange lists of sequences, so that a record does not depend on who
else is in the batch; `Experience` is the one padded record.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One conversation that waits for an answer."""

    id: str
    """Stable across runs: it seeds sampling and decides the train / held-out split."""
    messages: tuple[Mapping[str, str], ...]
    """`{"role", "content"}` in order; the last one is the user's."""
    prompt_ids: tuple[int, ...]
    """The rendered template up to and including the generation prompt."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of the row, handed to reward functions by name."""
    where: str = field(default="", compare=False)
    """`file:line` of its row, for messages; empty where it came from none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One response and what came with it."""

    prompt: Prompt
    sample_index: int
    """0 .. num_samples_per_prompt - 1."""
    response_ids: tuple[int, ...]
    """Sampled tokens only, the stop token included when one was sampled."""
    rollout_logprobs: tuple[float, ...]
    """log p of each response token under the sampler, at the sampling temperature."""
    finish_reason: FinishReason
    """`stop`: a stop token was sampled; `length`: the limit cut the answer."""
    response: str
    """Decoded answer without control tokens."""
    weight_version: int
    """The policy version that sampled it."""

    @property
    def input_ids(self) -> tuple[int, ...]:
        return self.prompt.prompt_ids + self.response_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The raw number of one response, with its parts."""

    total: float | None
    """Weighted sum of the parts; None when a part could not be scored."""
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """Unweighted parts by name."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why a part has no number, by its name: `KIND: what happened`, e.g. `timeout: no answer within 10 s`."""
    disagreement: float | None = None
    """Standard deviation of the scores of several reward models; None where there is one, or one has no score."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What scoring took, `PART/NAME`: amounts to add up over answers. Those of a call stand with its first answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, the first preferred. Both sides share the prompt ids."""

    id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    """Response tokens of the preferred answer, end-of-turn token included."""
    rejected_ids: tuple[int, ...]
    margin: float = 0.0
    """By how much the chosen answer's score should at least be the higher one."""
    source: str = ""
    """What a report tells accuracies of apart."""

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """Prompt and answer, the preferred one first."""
        return self.prompt_ids + self.chosen_ids, self.prompt_ids + self.rejected_ids

    @property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """A score is read at the last token of each."""
        return tuple((len(sequence) - 1,) for sequence in self.sequences)


@dataclass(frozen=True, kw_only=True, slots=True)
class SftExample:
    """One text to learn from: a conversation, or plain text."""

    id: str
    """Stable across runs: it decides the train / held-out split and seeds what is random about the example."""
    input_ids: tuple[int, ...]
    response_mask: tuple[bool, ...]
    """Tokens that are learnt: the assistant's turns with their end tokens, or all of a plain text. The first is not:
    nothing stands before it."""

    @property
    def num_trained(self) -> int:
        return sum(self.response_mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class Experience:
    """Training-ready PPO batch: B sequences, T tokens of prompt + response, right-padded.

    Every per-token tensor is (B, T) and position t speaks of token t. Padding may hold anything.
    """

    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """(B, T) bool, real tokens."""
    response_mask: Tensor
    """(B, T) bool, sampled tokens that may be learnt from; all False in an excluded row."""
    old_logprobs: Tensor
    """(B, T) float32, the trainer's, before this update."""
    rollout_logprobs: Tensor
    """(B, T) float32, the sampler's."""
    ref_logprobs: Tensor
    """(B, T) float32."""
    rewards: Tensor
    """(B, T) float32, per token, after KL shaping."""
    old_values: Tensor
    """(B, T) float32, the critic's, before this update."""
    advantages: Tensor
    """(B, T) float32, whitened over the global batch."""
    returns: Tensor
    """(B, T) float32."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __reduce__(self) -> Any:
        """As arrays, which an object store lends to every process on a machine without a copy. What arrives is
        therefore for reading alone."""
        return _of_arrays, tuple(getattr(self, f.name).cpu().numpy() for f in fields(self))

    def rows(self, index: Tensor) -> Experience:
        """The chosen rows, cut to their longest sequence. `index` (b,) int64."""
        longest = int(self.attention_mask[index].sum(1).max())
        return Experience(**{f.name: getattr(self, f.name)[index, :longest] for f in fields(self)})


def _of_arrays(*arrays: Any) -> Experience:
    with warnings.catch_warnings():
        # Of memory that may not be written to.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = [torch.from_numpy(array) for array in arrays]
    return Experience(**{f.name: tensor for f, tensor in zip(fields(Experience), tensors, strict=True)})


def pad_rows(rows: list[Tensor], *, value: float | int | bool = 0, length: int | None = None) -> Tensor:
    """Stack 1-D tensors of different lengths into (B, T), padding on the right."""
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    if length is not None and padded.shape[1] < length:
        padded = torch.nn.functional.pad(padded, (0, length - padded.shape[1]), value=value)
    return padded
