"""What a loss of pairs is made of: plain names and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["sigmoid", "robust", "ipo", "hinge", "cpo", "simpo", "orpo", "sft"]
REFERENCE_FREE = ("cpo", "simpo", "orpo", "sft")
SMOOTHED = ("sigmoid", "robust", "cpo", "simpo")
"""Kinds that read a label smoothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One loss of a sum."""

    kind: Kind = "sigmoid"
    weight: float = 1.0
    per_token: bool = False
    """Compare answers by their mean over tokens, of a kind that has a reference. simpo, orpo and sft always do."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: got {self.kind!r}, expected one of {get_args(Kind)}; choose one of them")
        if self.per_token and self.kind in REFERENCE_FREE:
            raise ValueError(f"per_token: got it with {self.kind}, expected a kind with a reference; remove it")
