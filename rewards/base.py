"""What a reward function is, how a config names one, and how several become one number.

A reward function takes all prompts and responses of a batch, and every other column of the rows by name, and
returns one number per response. None means "could not score": that response is left out and counted. A number is
never made up.

A parameter of its own without a default takes the column of that name, as does one whose default is None; any other
default is a setting, which no column may replace.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

SAMPLED = ("finish_reasons", "lengths")
"""Columns that every function is given beside those of the data: how each answer ended, and its number of tokens."""
RESERVED = ("prompts", "responses", *SAMPLED)
FLOAT32_MAX = 3.4028234663852886e38


class RewardFunction(Protocol):
    """`f(prompts, responses, **columns)`: one float, or None, per response."""

    def __call__(self, prompts: list[str], responses: list[str], **columns: Any) -> list[float | None]: ...


def load_function(name: str) -> RewardFunction:
    """The function that `module:function` names below the rewards package, and nothing outside it.

    Raises:
        ValueError: another form, an unknown module, no public function of that name defined there, or one that does
            not take columns it has no use for.
    """
    module_name, colon, function_name = name.partition(":")
    modules = sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name != "base")
    if not colon or not function_name:
        raise ValueError(f"reward function: got {name!r}, expected MODULE:FUNCTION such as text:finished_sentence")
    if module_name not in modules:
        raise ValueError(f"reward function: got module {module_name!r}, {_choice(module_name, modules)}")
    module = importlib.import_module(f"rewards.{module_name}")
    functions = {
        key: value
        for key, value in inspect.getmembers(module, inspect.isfunction)
        if value.__module__ == module.__name__ and _takes_texts(value)
    }
    if function_name not in functions:
        raise ValueError(
            f"reward function: got {function_name!r} in rewards.{module_name}, {_choice(function_name, functions)}"
        )
    function = functions[function_name]
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        raise ValueError(
            f"reward function: got {name!r} without **columns, expected f(prompts, responses, **columns); "
            "add it: every function is given every column"
        )
    return function


def check_columns(name: str, function: Callable[..., Any], columns: Collection[str]) -> None:
    """Refuse columns of the data that the function `name` cannot be called with.

    Raises:
        ValueError: a column that it needs is missing, replaces one of its settings, or has a reserved name.
    """
    refuse_reserved(columns)
    for parameter in list(inspect.signature(function).parameters.values())[2:]:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.default is parameter.empty and parameter.name not in {*columns, *SAMPLED}:
            raise ValueError(
                f"reward.functions: got {name} for data with the columns {sorted(columns)}, expected column "
                f"{parameter.name!r}, which it compares answers with; add that column, or choose another function"
            )
        if parameter.default not in (parameter.empty, None) and parameter.name in columns:
            raise ValueError(
                f"reward.functions: got a column {parameter.name!r} in the data, expected none of that name: it is a "
                f"setting of {name}, {parameter.default!r} by default; rename the column"
            )


def refuse_reserved(columns: Collection[str]) -> None:
    """Refuse a column by whose name reward functions are given something else."""
    if taken := sorted(set(columns) & set(RESERVED)):
        raise ValueError(
            f"reward.functions: got a column {taken[0]!r} in the data, expected none of {', '.join(RESERVED)}: "
            "reward functions are given their own; rename the column"
        )


def combine(
    parts: Mapping[str, Sequence[float | None]], weights: Mapping[str, float], *, num_responses: int | None = None
) -> tuple[list[float | None], list[dict[str, float | None]]]:
    """Weighted sum of the parts of every response.

    Args:
        parts: by name, one number or None per response.
        weights: by the same names.
        num_responses: how many there must be; None takes the first part's.

    Returns:
        The total of each response, None where a part is None; and its unweighted parts by name.

    Raises:
        ValueError: names that differ, no parts, a wrong length, something that is no finite number, or a total that
            float32, in which the learners compute, cannot hold.
    """
    if not parts or set(parts) != set(weights):
        raise ValueError(
            f"rewards: got parts {sorted(parts)} and weights {sorted(weights)}, expected the same names; align them"
        )
    expected = len(next(iter(parts.values()))) if num_responses is None else num_responses
    for name, numbers in parts.items():
        if not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) != expected:
            got = len(numbers) if isinstance(numbers, Sequence) else type(numbers).__name__
            raise ValueError(f"reward {name!r}: got {got} numbers, expected a list of {expected}, one per response")
        for index, number in enumerate(numbers):
            if number is not None and not _is_finite_number(number):
                raise ValueError(
                    f"reward {name!r}, response {index}: got {number!r}, expected a finite number, or None where it "
                    "cannot score; correct the function"
                )
    breakdown = [
        {name: None if numbers[i] is None else float(numbers[i]) for name, numbers in parts.items()}  # type: ignore[arg-type]
        for i in range(expected)
    ]
    totals = [_total(one, weights) for one in breakdown]
    for index, total in enumerate(totals):
        if total is not None and not abs(total) <= FLOAT32_MAX:
            raise ValueError(
                f"rewards, response {index}: got a total of {total!r} from {breakdown[index]}, expected one that "
                "float32 can hold; lower the weights"
            )
    return totals, breakdown


def _takes_texts(function: Callable[..., Any]) -> bool:
    return list(inspect.signature(function).parameters)[:2] == ["prompts", "responses"]


def _total(one: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    total = 0.0
    for name, number in one.items():
        if number is None:
            return None
        total += weights[name] * number
    return total


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _choice(got: str, known: Any) -> str:
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.4)
    return f"expected one of {sorted(known)}; " + (f"did you mean {near[0]!r}?" if near else "choose one of them")
