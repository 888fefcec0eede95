"""What a reward function is, how a config names one, and how several become one number.

A reward function takes all prompts and responses of a batch, and every other column of the rows by name, and
returns one number per response. None means "could not score": that response is left out and counted. A number is
never made up.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol


class RewardFunction(Protocol):
    """`f(prompts, responses, **columns)`: one float, or None, per response."""

    def __call__(self, prompts: list[str], responses: list[str], **columns: Any) -> list[float | None]: ...


def load_function(name: str) -> RewardFunction:
    """The function that `module:function` names below the rewards package, and nothing outside it.

    Raises:
        ValueError: another form, an unknown module, or no public function of that name defined there.
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
    return functions[function_name]


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
        ValueError: names that differ, no parts, a wrong length, or something that is no finite number.
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
    return [_total(one, weights) for one in breakdown], breakdown


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
