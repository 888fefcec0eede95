"""The workers of a run as Ray actors; the only package that imports ray.

Names are resolved on first use, so that an in-process run never imports ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.critic import CriticActor
    from actors.group import ActorGroup
    from actors.policy import PolicyActor
    from actors.reference import ReferenceActor
    from actors.reward import RewardModelActor
    from actors.rollout import RolloutActor

_HOMES = {
    "PolicyActor": "policy",
    "CriticActor": "critic",
    "ReferenceActor": "reference",
    "RewardModelActor": "reward",
    "RolloutActor": "rollout",
    "ActorGroup": "group",
}

__all__ = ["ActorGroup", "CriticActor", "PolicyActor", "ReferenceActor", "RewardModelActor", "RolloutActor"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'actors' has no attribute {name!r}")
    return getattr(importlib.import_module(f"actors.{_HOMES[name]}"), name)
