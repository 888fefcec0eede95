"""The two learners of PPO (Schulman 2017): the policy and its critic, each a model, an optimiser and a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignment.adapters import TrainingMethod
from alignment.advantages import gae
from alignment.batching import minibatches, rollout_batch, rollout_lengths
from alignment.engines.base import Engine
from alignment.forward import response_logprobs, response_values
from alignment.learners.base import (
    Tally,
    begin_update,
    finish_update,
    load_method,
    method_metrics,
    method_state,
    own_micro_batches,
    per_response,
)
from alignment.losses import Metrics, aggregate, ppo_policy_loss, ppo_value_loss
from alignment.models import CausalModel
from alignment.packing import MicroBatchLimit
from alignment.rollout_correction import correction_weights, mismatch_metrics, require_match
from alignment.schedules import KlAdaptiveRate
from alignment.types import Experience, Rollout


class PolicyLearner:
    """Clipped policy gradient over `ppo_epochs` x minibatches x micro-batches.

    Losses are divided by the minibatch's count of response tokens, so that the micro-batches change memory only.
    """

    def __init__(
        self,
        model: CausalModel,
        engine: Engine,
        *,
        temperature: float = 1.0,
        minibatch_size: int,
        micro_batch_limit: MicroBatchLimit,
        ppo_epochs: int = 1,
        clip_ratio: float = 0.2,
        clip_ratio_high: float | None = None,
        dual_clip: float | None = None,
        entropy_coef: float = 0.0,
        kl_stop: float | None = None,
        adaptive_rate: KlAdaptiveRate | None = None,
        correction: Mapping[str, Any] | None = None,
        logprob_gap_limit: float = math.inf,
        seed: int = 0,
        device: torch.device | str = "cpu",
        method: TrainingMethod | None = None,
    ) -> None:
        """
        Args:
            correction: the settings of `correction_weights`; None weights every token alike.
            logprob_gap_limit: largest mean gap to the sampler that `update_on_policy` accepts.
            method: what is told of every update.
        """
        self.model, self.engine, self.method, self.temperature = model, engine, method, temperature
        self.minibatch_size, self.micro_batch_limit, self.ppo_epochs = minibatch_size, micro_batch_limit, ppo_epochs
        self.clip = {"clip_ratio": clip_ratio, "clip_ratio_high": clip_ratio_high, "dual_clip": dual_clip}
        self.entropy_coef, self.kl_stop, self.adaptive_rate = entropy_coef, kl_stop, adaptive_rate
        self.correction, self.logprob_gap_limit = correction, logprob_gap_limit
        self.seed, self.device = seed, device

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Per rollout (R_i,) float32 log-probabilities of its response tokens, without gradient."""
        return per_response(
            rollouts,
            lambda ids, mask, response: response_logprobs(
                self.model, ids, mask, response, temperature=self.temperature
            )[0],
            limit=self.micro_batch_limit,
            device=self.device,
            lockstep=self.engine.lockstep,
        )

    def update_on_policy(self, experience: Experience, *, step: int) -> dict[str, float]:
        """One update in which the policy's own forward is the old policy: the ratio is 1 whatever was sampled.

        Also returns the `mismatch_metrics` of the sampler to it.

        Raises:
            RuntimeError: their mean gap is above `logprob_gap_limit`; no optimiser step was made.
        """
        tally = Tally(self.engine.ranks)
        if not experience.response_mask.any():
            return {"ppo/updates_count": 0.0}
        tally.begin_minibatch()
        begin_update(self.engine, self.method)
        index, lengths = torch.arange(len(experience)), experience.attention_mask.sum(1)
        count, old = self._token_count(experience, index), torch.zeros_like(experience.rollout_logprobs)
        for rows in self._own_micro_batches(index, lengths):
            loss, metrics, logprobs = self._loss(experience.rows(rows), count, own_forward_is_old=True)
            self.engine.backward(loss)
            tally.add(metrics)
            old[rows, : logprobs.shape[1]] = logprobs.cpu()
        tally.end_minibatch()
        self.engine.ranks.sum_([old])  # zeros but for each rank's own rows
        mismatch = mismatch_metrics(old, experience.rollout_logprobs, experience.response_mask)
        require_match(mismatch, self.logprob_gap_limit, step=step)
        tally.add(finish_update(self.engine, self.method))
        return {**tally.result("ppo"), **mismatch, **method_metrics(self.method), "ppo/updates_count": 1.0}

    def update(self, experience: Experience, *, step: int) -> dict[str, float]:
        """Improve the policy on one batch. Stops early once a minibatch's KL to the old policy exceeds `kl_stop`.

        The adaptive rate follows the KL of the last minibatch that was measured after a step of this batch; before
        the first step the policy is the old one and there is nothing to follow.
        """
        tally = Tally(self.engine.ranks)
        lengths = experience.attention_mask.sum(1)
        num_updates, moved, last_kl = 0, False, None
        for _, index in minibatches(
            len(experience), self.minibatch_size, epochs=self.ppo_epochs, seed=self.seed, step=step
        ):
            if not experience.response_mask[index].any():
                continue
            tally.begin_minibatch()
            begin_update(self.engine, self.method)
            for rows in self._own_micro_batches(index, lengths):
                loss, metrics, _ = self._loss(experience.rows(rows), self._token_count(experience, index))
                self.engine.backward(loss)
                tally.add(metrics)
            tally.end_minibatch()
            kl = tally.current("approx_kl")
            if moved:
                last_kl = kl
            stepped = finish_update(self.engine, self.method)
            tally.add(stepped)
            num_updates, moved = num_updates + 1, moved or not stepped["skipped_count"]
            if self.kl_stop is not None and kl > self.kl_stop:
                break
        if self.adaptive_rate is not None and last_kl is not None:
            self.engine.rate_factor = self.adaptive_rate.update(last_kl)
        return {**tally.result("ppo"), **method_metrics(self.method), "ppo/updates_count": float(num_updates)}

    @torch.no_grad()
    def check(self, experience: Experience) -> dict[str, float]:
        """The metrics of a first update, without making it: ratio 1, KL 0 and nothing clipped, or a bug.

        Raises:
            RuntimeError: no row of the batch has a response token to learn from, so there is nothing to measure.
        """
        tally = Tally(self.engine.ranks)
        tally.begin_minibatch()
        index = experience.response_mask.any(1).nonzero().squeeze(1)[: self.minibatch_size]
        if not len(index):
            raise RuntimeError(
                f"first step: got no answer to learn from among {len(experience)}, expected at least one: none has "
                "both a score and a token; mend the reward before training"
            )
        lengths = experience.attention_mask.sum(1)
        for rows in self._own_micro_batches(index, lengths, backward=False):
            _, metrics, _ = self._loss(experience.rows(rows), self._token_count(experience, index))
            tally.add(metrics)
        tally.end_minibatch()
        return tally.result("ppo")

    def _own_micro_batches(self, index: Tensor, lengths: Tensor, *, backward: bool = True) -> list[Tensor]:
        limit = self.micro_batch_limit
        return own_micro_batches(self.model, self.engine, index, lengths, limit, backward=backward, device=self.device)

    def _token_count(self, experience: Experience, index: Tensor) -> float:
        return max(float(experience.response_mask[index].sum()), 1.0)

    def _loss(
        self, rows: Experience, denominator: float, *, own_forward_is_old: bool = False
    ) -> tuple[Tensor, Metrics, Tensor]:
        """Loss and metrics of a micro-batch, and its (b, T) log-probabilities under the policy, without gradient."""
        batch = _to(rows, self.device)
        logprobs, entropy = response_logprobs(
            self.model,
            batch.input_ids,
            batch.attention_mask,
            batch.response_mask,
            temperature=self.temperature,
            with_entropy=self.entropy_coef > 0,
        )
        own = logprobs.detach()
        old = own if own_forward_is_old else batch.old_logprobs
        weights, corrected = self._weights(old, batch, denominator)
        loss, metrics = ppo_policy_loss(
            logprobs,
            old,
            batch.advantages,
            batch.response_mask,
            **self.clip,  # type: ignore[arg-type]
            weights=weights,
            denominator=denominator,
        )
        metrics = {"policy_loss": loss.detach(), **metrics, **corrected}
        if entropy is not None:
            bonus = aggregate(entropy, batch.response_mask, mode="token_mean", denominator=denominator)
            loss = loss - self.entropy_coef * bonus
            metrics["entropy"] = bonus.detach()
        return loss, metrics, own

    def _weights(self, old: Tensor, batch: Experience, denominator: float) -> tuple[Tensor | None, Metrics]:
        if self.correction is None:
            return None, {}
        return correction_weights(
            old, batch.rollout_logprobs, batch.response_mask, **self.correction, denominator=denominator
        )

    def state_dict(self) -> dict[str, Any]:
        rate = None if self.adaptive_rate is None else self.adaptive_rate.state_dict()
        return {"engine": self.engine.state_dict(), "adaptive_rate": rate, **method_state(self.method)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.engine.load_state_dict(state["engine"])
        load_method(self.method, state)
        if self.adaptive_rate is not None and state["adaptive_rate"] is not None:
            self.adaptive_rate.load_state_dict(state["adaptive_rate"])


class CriticLearner:
    """Clipped value regression on the returns, in the same minibatches as the policy's."""

    def __init__(
        self,
        model: CausalModel,
        engine: Engine,
        *,
        minibatch_size: int,
        micro_batch_limit: MicroBatchLimit,
        ppo_epochs: int = 1,
        value_clip: float | None = 0.2,
        vf_coef: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        method: TrainingMethod | None = None,
    ) -> None:
        self.model, self.engine, self.method = model, engine, method
        self.minibatch_size, self.micro_batch_limit, self.ppo_epochs = minibatch_size, micro_batch_limit, ppo_epochs
        self.value_clip, self.vf_coef, self.seed, self.device = value_clip, vf_coef, seed, device

    def values(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Per rollout (R_i,) float32: entry t is the value of the state that emits response token t."""
        return per_response(
            rollouts,
            lambda ids, mask, _: response_values(self.model, ids, mask),
            limit=self.micro_batch_limit,
            device=self.device,
            lockstep=self.engine.lockstep,
        )

    def update(self, experience: Experience, *, step: int) -> dict[str, float]:
        """Fit the returns on one batch."""
        tally = Tally(self.engine.ranks)
        lengths = experience.attention_mask.sum(1)
        for _, index in minibatches(
            len(experience), self.minibatch_size, epochs=self.ppo_epochs, seed=self.seed, step=step
        ):
            count = float(experience.response_mask[index].sum())
            if count == 0:
                continue
            tally.begin_minibatch()
            begin_update(self.engine, self.method)
            for rows in self._own_micro_batches(index, lengths):
                batch = _to(experience.rows(rows), self.device)
                loss, metrics = ppo_value_loss(
                    response_values(self.model, batch.input_ids, batch.attention_mask),
                    batch.old_values,
                    batch.returns,
                    batch.response_mask,
                    value_clip=self.value_clip,
                    denominator=count,
                )
                self.engine.backward(self.vf_coef * loss)
                tally.add({"value_loss": loss.detach(), **metrics})
            tally.end_minibatch()
            tally.add(finish_update(self.engine, self.method))
        return tally.result("critic")

    def fit(
        self,
        rollouts: Sequence[Rollout],
        rewards: Sequence[Tensor],
        *,
        gamma: float,
        gae_lambda: float,
    ) -> tuple[list[Tensor], dict[str, float]]:
        """Values and update from one forward: the values are those from before the update.

        Args:
            rewards: per rollout (R_i,), after KL shaping; an empty tensor excludes the rollout.

        The returns of a sequence need its own values only, so each micro-batch is complete in itself.
        """
        values: list[Tensor] = [torch.empty(0)] * len(rollouts)
        count = float(sum(len(row) for row in rewards))
        tally = Tally(self.engine.ranks)
        tally.begin_minibatch()
        begin_update(self.engine, self.method)
        lengths = rollout_lengths(rollouts)
        for rows in self._own_micro_batches(torch.arange(len(rollouts)), lengths, backward=count > 0):
            chosen = [rollouts[i] for i in rows.tolist()]
            ids, mask, response = rollout_batch(chosen, self.device)
            learn = response & torch.tensor([[len(rewards[i]) > 0] for i in rows.tolist()], device=self.device)
            predicted = response_values(self.model, ids, mask)
            now = predicted.detach()
            for i, row, where in zip(rows.tolist(), now, response, strict=True):
                values[i] = row[where].cpu()
            if not count:
                continue
            placed = torch.zeros_like(now)
            placed[learn] = torch.cat([rewards[i] for i in rows.tolist()]).to(now)
            _, returns = gae(placed, now, learn, gamma=gamma, gae_lambda=gae_lambda)
            loss, metrics = ppo_value_loss(
                predicted, now, returns, learn, value_clip=self.value_clip, denominator=count
            )
            self.engine.backward(self.vf_coef * loss)
            tally.add({"value_loss": loss.detach(), **metrics})
        tally.end_minibatch()
        if count:
            tally.add(finish_update(self.engine, self.method))
        return self._of_all_ranks(values, rollouts), tally.result("critic")

    def _own_micro_batches(self, index: Tensor, lengths: Tensor, *, backward: bool = True) -> list[Tensor]:
        limit = self.micro_batch_limit
        return own_micro_batches(self.model, self.engine, index, lengths, limit, backward=backward, device=self.device)

    def _of_all_ranks(self, values: list[Tensor], rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Every rank's own rows, put together."""
        if self.engine.ranks.size == 1:
            return values
        sizes = [len(rollout.response_ids) for rollout in rollouts]
        rows = [row if len(row) else torch.zeros(n) for row, n in zip(values, sizes, strict=True)]
        flat = torch.cat(rows)
        self.engine.ranks.sum_([flat])
        return list(flat.split(sizes))

    def state_dict(self) -> dict[str, Any]:
        return {"engine": self.engine.state_dict(), **method_state(self.method)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.engine.load_state_dict(state["engine"])
        load_method(self.method, state)


def _to(experience: Experience, device: torch.device | str) -> Experience:
    if torch.device(device).type == "cpu":
        return experience
    return Experience(**{name: getattr(experience, name).to(device) for name in Experience.__slots__})
