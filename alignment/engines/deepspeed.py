"""DeepSpeed's ZeRO (Rajbhandari 2020, arXiv 1910.02054): what the ranks split, and what moves to host memory."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alignment.config.splitting import refuse_low_stage
from alignment.distributed import Ranks
from alignment.engines.base import Engine, Offload, Schedule, ZeroStage, refuse_hook
from alignment.engines.torch import MOMENTS, load_torch_state, make_adamw, torch_state
from alignment.models import HfModel
from alignment.sharding import num_elements

PERSISTENT_ELEMENTS = 100_000
"""Parameters of stage 3 that are smaller stay whole."""


class DeepSpeedEngine(Engine):
    """AdamW under ZeRO: stage 1 splits moments and float32 masters over the ranks, 2 gradients too, 3 weights too."""

    def __init__(
        self,
        model: HfModel,
        *,
        ranks: Ranks,
        zero_stage: ZeroStage,
        offload: Offload = "none",
        device: str = "cpu",
        **settings: Any,
    ) -> None:
        """
        Args:
            model: handed over to DeepSpeed: calls through `model.run` go by its engine from here on.
            ranks: those of torch's default process group.
            offload: "optimizer" keeps masters and moments in host memory, "all" the weights of stage 3 too.
            settings: those of `Schedule`.

        Raises:
            ValueError: a stage below 2 for parameters below float32.
        """
        super().__init__(Schedule(**settings), ranks)
        # Stage 1 cannot step where no backward pass was made, stage 2 meets in every one, stage 3 in forwards too.
        self.zero_stage, self.in_lockstep = zero_stage, zero_stage >= 1
        deepspeed = _import_deepspeed(device)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._low = [name for name, p in self._trained.items() if p.dtype.itemsize < 4]
        if self._low:
            refuse_low_stage(zero_stage)
        if zero_stage == 3:
            # `head` reads it outside of the module that owns it.
            deepspeed.zero.register_external_parameter(model, model.head_weight)
        self._norm = math.nan
        optimizer = make_adamw(list(self._trained.values()), self.schedule)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=_config(self.schedule, zero_stage, offload, bfloat16=bool(self._low)),
            dist_init_required=False,
        )
        model.enter_by(self.engine)
        if zero_stage:
            self._start_moments()
        else:
            optimizer.register_step_pre_hook(self._clip)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the loss is already divided by the count of all.
        self.engine.backward(loss * self.ranks.size, scale_wrt_gas=False)

    def _update(self, rate: float, before_forgetting: Callable[[], None] | None) -> float:
        refuse_hook(before_forgetting, "deepspeed")
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        if self.zero_stage:
            self._norm = float(self.engine.get_global_grad_norm())
        return self._norm

    def _clip(self, *_: Any) -> None:
        """Of stage 0, whose gradients are summed when the step begins; none is left of those that are not finite."""
        parameters = list(self._trained.values())
        self._norm = float(nn.utils.clip_grad_norm_(parameters, self.schedule.max_grad_norm))
        if not math.isfinite(self._norm):
            for parameter in parameters:
                parameter.grad = None

    def _flat_parts(self) -> list[Tensor]:
        """This rank's float32 masters, as ZeRO lays them out."""
        optimizer = self.engine.optimizer
        flat: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat
            if self.zero_stage == 3
            else optimizer.single_partition_of_fp32_groups
        )
        return flat

    def _start_moments(self) -> None:
        """Zeros, as AdamW starts with: there before the first step, so that they can be saved and loaded."""
        for part in self._flat_parts():
            self.engine.optimizer.optimizer.state[part] = {
                "step": torch.zeros((), device=part.device),
                **{key: torch.zeros_like(part) for key in MOMENTS},
            }
        if self.zero_stage < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _names_of_masters(self) -> list[str]:
        return self._low

    def _optimizer_state(self) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        if not self.zero_stage:
            return torch_state(self.engine.optimizer, self._trained, keep=self.ranks.rank == 0), {}
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        keep = self.ranks.rank == 0
        steps = float(next(iter(self.engine.optimizer.optimizer.state.values()))["step"])
        moments: dict[str, dict[str, Any]] = {}
        masters: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            row = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if keep and steps:
                moments[name] = {"step": steps, **{key: tensor.cpu() for key, tensor in row.items()}}
            if name in self._low:
                master = safe_get_full_fp32_param(parameter)
                masters |= {name: master.cpu()} if keep else {}
        return moments, masters

    @torch.no_grad()
    def _load_optimizer_state(self, moments: dict[str, dict[str, Any]], masters: dict[str, Tensor]) -> None:
        if not self.zero_stage:
            load_torch_state(self.engine.optimizer, self._trained, moments)
            return
        optimizer = self.engine.optimizer
        optimizer.refresh_fp32_params()
        for name, parameter in self._trained.items():
            if name in masters:
                self._set_part(parameter, masters[name])
            for key in MOMENTS:
                saved = moments[name][key] if name in moments else torch.zeros(num_elements(parameter))
                self._set_part(parameter, saved, key)
        # One count for all: ZeRO lays many parameters out as one.
        steps = max((row["step"] for row in moments.values()), default=0.0)
        for state in optimizer.optimizer.state.values():
            state["step"].fill_(steps)

    def _set_part(self, parameter: Tensor, value: Tensor, moment: str | None = None) -> None:
        """Copy this rank's part of `value` into a moment, or into the float32 master."""
        from deepspeed import utils

        if self.zero_stage < 3:
            if moment is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, moment)
            return
        # Parts are equally long: the last one is padded.
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        padded = torch.zeros(size * self.ranks.size)
        padded[: value.numel()] = value.flatten()
        part = padded[size * self.ranks.rank : size * (self.ranks.rank + 1)]
        if moment is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, moment)


def _import_deepspeed(device: str) -> Any:
    """DeepSpeed, told what it runs on and to say only what matters.

    Raises:
        ValueError: it is not installed.
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # A process sees no devices but its own: Ray hides the others.
    os.environ["LOCAL_RANK"] = "0"
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            "engine: got deepspeed, which is not installed, expected it or torch; pip install "
            "'raylign[deepspeed]', or engine: torch, which splits by FSDP2"
        ) from error
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # of its calls to torch
    # Its shared-memory kernels are for inference, take a compiler, and expect all ranks on this machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device == "cpu" else "nccl", dist_init_required=False)
    return deepspeed


def _config(schedule: Schedule, zero_stage: int, offload: Offload, *, bfloat16: bool) -> dict[str, Any]:
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
    }
    if offload != "none":
        zero["offload_optimizer"] = host
    if offload == "all":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # How many micro-batches a step has is the learner's business.
        "managed_gradient_accumulation": False,
        "gradient_clipping": schedule.max_grad_norm if zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bfloat16, "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**62,
    }
