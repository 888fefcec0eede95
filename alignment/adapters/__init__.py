"""Parameter-efficient training of a transformers model: attach, switch off, merge and store. The only importer of
peft; docs/peft.md compares the methods."""

from alignment.adapters.adalora import RankBudget
from alignment.adapters.attach import attach, check_targets, share_start
from alignment.adapters.layers import adapter_disabled, has_adapter, target_names
from alignment.adapters.low_rank import attach_lora
from alignment.adapters.merge import (
    export_merged,
    is_split_model,
    mergeable,
    merged_sizes,
    merged_state_dict,
    merged_weights,
)
from alignment.adapters.method import TrainingMethod
from alignment.adapters.rounding import absorb_rounding
from alignment.adapters.storage import export_adapter, load_adapter, save_adapter
from alignment.adapters.virtual_tokens import TokenSettings

__all__ = [
    "RankBudget",
    "TokenSettings",
    "TrainingMethod",
    "absorb_rounding",
    "adapter_disabled",
    "attach",
    "attach_lora",
    "check_targets",
    "export_adapter",
    "export_merged",
    "has_adapter",
    "is_split_model",
    "load_adapter",
    "mergeable",
    "merged_sizes",
    "merged_state_dict",
    "merged_weights",
    "save_adapter",
    "share_start",
    "target_names",
]
