"""What a reward function is, how a config names one, and what it may be called with.

A reward function takes all prompts and responses of a batch, and every other column of the rows by name, and
returns one number per response. None means "could not score": that response is left out and counted. A number is
never made up.

A parameter of its own without a default takes the column of that name, as does one whose default is None; any other
default is a setting, which no column may replace. A config may give a value to any of them: it is a setting then.

Each response is scored for itself: answers are handed over in portions, and one by one where a portion fails.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_type_hints

Function = TypeVar("Function", bound=Callable[..., Any])

SAMPLED = ("finish_reasons", "lengths")
"""Columns that every function is given beside those of the data: how each answer ended, and its number of tokens."""
RESERVED = ("prompts", "responses", *SAMPLED)
NO_REWARDS = frozenset({"base", "pool", "worker", "jail"})
"""Modules of the package that hold no reward functions."""


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
    modules = sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name not in NO_REWARDS)
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


def only_where(check: Callable[..., None]) -> Callable[[Function], Function]:
    """Let `check(**settings)` refuse, before a run starts, what the function would refuse on its first call."""

    def mark(function: Function) -> Function:
        vars(function)["check"] = check
        return function

    return mark


def check_settings(
    name: str, function: Callable[..., Any], settings: Mapping[str, Any], *, key: str = "reward.functions"
) -> None:
    """Refuse settings that the function `name` does not have, or of another type than it says; then ask its own check.

    `key`: of the config that names the function.

    Raises:
        ValueError: an unknown setting, one that is given by every call, a wrong type, or what the check refuses.
    """
    from pydantic import TypeAdapter, ValidationError  # which the processes that run the functions do without

    own = {p.name: p for p in _own_parameters(function)}
    hints = get_type_hints(function)
    for setting, value in settings.items():
        if setting in SAMPLED or setting not in own:
            known = sorted(set(own) - set(SAMPLED))
            expected = _choice(setting, known) if known else "expected none: it has no settings; remove it"
            raise ValueError(f"{key}: got a setting {setting!r} of {name}, {expected}")
        try:
            TypeAdapter(hints.get(setting, Any)).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            raise ValueError(
                f"{key}: got {setting}: {value!r} as a setting of {name}, expected "
                f"{inspect.formatannotation(hints[setting])} ({error.errors()[0]['msg']}); correct it"
            ) from None
    if check := getattr(function, "check", None):
        taken = inspect.signature(check).parameters
        check(**{setting: value for setting, value in settings.items() if setting in taken})


def check_columns(
    name: str,
    function: Callable[..., Any],
    columns: Collection[str],
    settings: Collection[str] = (),
    *,
    key: str = "reward.functions",
) -> None:
    """Refuse columns of the data that the function `name` cannot be called with.

    Args:
        settings: names of the parameters that the config gives a value.
        key: of the config that names the function.

    Raises:
        ValueError: a column that it needs is missing, replaces one of its settings, or has a reserved name.
    """
    refuse_reserved(columns)
    for parameter in _own_parameters(function):
        if parameter.name in settings:
            if parameter.name in columns:
                raise ValueError(
                    f"{key}: got a column {parameter.name!r} in the data, expected none of that name: the "
                    f"config gives {name} this setting; rename the column, or remove the setting"
                )
            continue
        if parameter.default is parameter.empty and parameter.name not in {*columns, *SAMPLED}:
            raise ValueError(
                f"{key}: got {name} for data with the columns {sorted(columns)}, expected column "
                f"{parameter.name!r}, which it compares answers with; add that column, or choose another function"
            )
        if parameter.default not in (parameter.empty, None) and parameter.name in columns:
            raise ValueError(
                f"{key}: got a column {parameter.name!r} in the data, expected none of that name: it is a "
                f"setting of {name}, {parameter.default!r} by default; rename the column"
            )


def refuse_reserved(columns: Collection[str]) -> None:
    """Refuse a column by whose name reward functions are given something else."""
    if taken := sorted(set(columns) & set(RESERVED)):
        raise ValueError(
            f"reward.functions: got a column {taken[0]!r} in the data, expected none of {', '.join(RESERVED)}: "
            "reward functions are given their own; rename the column"
        )


def _own_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those beside the prompts, the responses and `**columns`."""
    named = list(inspect.signature(function).parameters.values())[2:]
    return [p for p in named if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _takes_texts(function: Callable[..., Any]) -> bool:
    return list(inspect.signature(function).parameters)[:2] == ["prompts", "responses"]


def _choice(got: str, known: Any) -> str:
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.4)
    return f"expected one of {sorted(known)}; " + (f"did you mean {near[0]!r}?" if near else "choose one of them")
