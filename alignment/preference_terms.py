"""What a loss of pairs is made of: plain names and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

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


class AnyTerm(Protocol):
    """A `Term`, or a config of one."""

    @property
    def kind(self) -> Kind: ...
    @property
    def per_token(self) -> bool: ...


def use_reference(terms: Sequence[AnyTerm]) -> bool:
    """Whether any of them compares with a reference."""
    return any(term.kind not in REFERENCE_FREE for term in terms)


def refuse_odd_terms(terms: Sequence[AnyTerm], name: str = "terms") -> None:
    """
    Raises:
        ValueError: none of them compares answers, or one comes twice.
    """
    kinds = [term.kind for term in terms]
    if set(kinds) <= {"sft"}:
        raise ValueError(f"{name}: got {kinds}, expected one at least that compares answers; add sigmoid")
    if len({(term.kind, term.per_token) for term in terms}) < len(kinds):
        raise ValueError(f"{name}: got {kinds}, expected each once; add up their weights")
