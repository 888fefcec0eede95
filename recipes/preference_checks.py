"""What runs on pairs and labels refuse before they begin, what they make first, and the weights of their classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from alignment.config import AdapterConfig, KtoRunConfig, ModelConfig
from alignment.config.model import VIRTUAL_TOKEN_TYPES
from alignment.data.tasks import Tasks
from alignment.label_losses import balanced_weights, imbalance
from alignment.model_checks import check_model
from alignment.shared_prompts import MASKED_ATTENTION, sees_all
from recipes import checks, common
from recipes.rule_evaluation import RuleEvaluation
from recipes.settling import shares_prompts

Job = common.Job[Any]


def make_first(job: Job, paths: Iterable[str | None]) -> bool:
    """Run the stages that make what this run reads, its model or rows at `paths`, and that is not there yet, on the
    same machines.

    A dry run checks them, and can check no more than the model before there are rows: False.
    """
    config = job.config
    first = checks.not_yet_made(paths)
    if not first:
        return True
    base = config.model_copy(update={"model": checks.resolve_policy(config.model)})
    checks.check_trainee(dataclasses.replace(job, config=base), "policy")
    checks.check_start(job)
    for recipe, folder in first.items():
        common.check_first(job, common.main_of(recipe), folder)
    for recipe, folder in first.items():
        if job.dry_run:
            print(f"{folder}/final is not there yet: it would be made first")
        else:
            common.train_first(job, common.main_of(recipe), folder)
    return not job.dry_run


def check_preferences(job: Job) -> tuple[checks.Trainee, RuleEvaluation]:
    """Refuse whatever would fail later; nothing on disk is changed, no actor is started."""
    config = job.config
    model = checks.check_trainee(job, "policy")
    if shares_prompts(config):
        refuse_unshared(config.model.at(model.path, config.model.revision), config.training.adapter)
    if config.reference.sync_share < 1 and config.model.dtype != "float32":
        raise ValueError(
            f"reference.sync_share: got {config.reference.sync_share:g} with model.dtype {config.model.dtype}, "
            "expected float32: a part of a small step is lost in rounding, and the reference stays; set model.dtype: "
            "float32, or sync_share: 1"
        )
    if config.reference.sync_every:
        refuse_split_adapter(job, config.training.adapter, "reference.sync_every")
    evaluation = RuleEvaluation(config.evaluation, model.tokenizer, system_prompt=config.data.system_prompt)
    if evaluation.prompts:
        checks.check_answering(job)
    return model, evaluation


def refuse_unshared(model: ModelConfig, adapter: AdapterConfig) -> None:
    """What the learner would refuse of share_prompts once the weights are loaded. `model`: of a resolved path."""
    from transformers import AutoConfig

    if model.attention not in ("auto", *MASKED_ATTENTION):
        raise ValueError(
            f"model.attention: got {model.attention} with share_prompts, expected one that takes a mask; set "
            "model.attention: sdpa, or share_prompts: false"
        )
    if adapter.type in VIRTUAL_TOKEN_TYPES:
        raise ValueError(
            f"share_prompts: got true with adapter.type={adapter.type}, expected no virtual tokens in front of a "
            "sequence; set it to false, or type to lora"
        )
    if not sees_all(AutoConfig.from_pretrained(model.path, revision=model.revision)):
        raise ValueError(
            f"share_prompts: got true with {model.path}, whose layers do not all look back to the first token, "
            "expected full attention; set it to false"
        )


def refuse_long_mismatched(config: KtoRunConfig, model: checks.Trainee, tasks: Tasks[Any]) -> None:
    """KTO's baseline is of answers to other prompts: the longest answer behind the longest prompt must fit as well."""
    if config.kto.loss != "kto":
        return
    records = [*tasks.train, *tasks.held_out]
    lengths = {
        "the longest prompt": max(len(record.prompt_ids) for record in records),
        "the longest answer within data.max_tokens": max(len(record.answer_ids) for record in records),
    }
    own = config.model.at(model.path, config.model.revision)
    check_model("training", own, model.tokenizer, config.training.adapter, lengths=lengths)


def refuse_split_adapter(job: Job, adapter: AdapterConfig, key: str) -> None:
    """Of a reference that moves, which has a copy of the adapter. `key`: what asks for that."""
    policy = job.cluster.policy
    if adapter.enabled and not job.local and policy.engine == "deepspeed" and policy.zero_stage == 3:
        raise ValueError(
            f"{key}: got it with an adapter whose parts policy.engine: deepspeed holds at zero_stage 3, "
            "expected whole ones; set zero_stage: 2, or engine: torch"
        )


def balance(config: KtoRunConfig, tasks: Tasks[Any]) -> tuple[KtoRunConfig, str | None]:
    """The config with the weights that `kto.balance` asks for, and what is still out of balance. Classes are counted
    as the mixture of tasks brings them."""
    kto, count = config.kto, len(tasks.train)
    good = round(count * tasks.expected_share(lambda record: record.target == 1))
    weights = kto.desirable_weight, kto.undesirable_weight
    if kto.balance == "auto":
        weights = balanced_weights(good, count - good, desirable_weight=weights[0], undesirable_weight=weights[1])
        kto = kto.model_copy(update={"desirable_weight": weights[0], "undesirable_weight": weights[1]})
    warning = imbalance(good, count - good, desirable_weight=weights[0], undesirable_weight=weights[1])
    return config.model_copy(update={"kto": kto}), warning
