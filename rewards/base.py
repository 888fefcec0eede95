"""What a reward function is, how a config names one, and what it may be called with.

A reward function takes all prompts and responses of a batch, and every other column of the rows by name, and
returns one number per response. None means "could not score": that response is left out and counted. A number is
never made up. A function that has more to tell, why there is no number or what the call has cost, returns a `Part`.

A parameter of its own without a default takes the column of that name, as does one whose default is None; any other
default is a setting, which no column may replace. A config may give a value to any of them: it is a setting then.

Each response is scored for itself: answers are handed over in portions, and one by one where a portion fails.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_type_hints

Function = TypeVar("Function", bound=Callable[..., Any])

SAMPLED = ("finish_reasons", "lengths", "prompt_messages")
"""Columns that every function is given beside those of the data: how each answer ended, its number of tokens, and the
whole conversation before it, `{"role", "content"}` each, of which its prompt is the last message."""
RESERVED = ("prompts", "responses", *SAMPLED)
NO_REWARDS = frozenset({"base", "pool", "worker", "jail"})
"""Modules of the package that hold no reward functions."""
MEASURED = frozenset({"mean", "std", "unscored_count", "clipped_share", "proxy_spearman"})
"""What a run measures of every part: no function counts under these names."""
FLOAT32_MAX = 3.4028234663852886e38
"""Learners compute in float32."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one function said of some answers."""

    numbers: Sequence[float | None]
    """One per response."""
    failures: dict[int, str] = field(default_factory=dict)
    """Why there is none, by the index of the response: `KIND: what happened`, with a KIND of a-z and _."""
    counts: dict[str, float] = field(default_factory=dict)
    """What it took, e.g. `request_count`: amounts that add up over calls, processes and actors. None of MEASURED."""


def fits(number: Any) -> bool:
    """Whether it is a finite number that float32 can hold."""
    real = isinstance(number, Real) and not isinstance(number, bool)
    return real and bool(abs(number) <= FLOAT32_MAX)


class RewardFunction(Protocol):
    """`f(prompts, responses, **columns)`: one float, or None, per response."""

    def __call__(self, prompts: list[str], responses: list[str], **columns: Any) -> Sequence[float | None] | Part: ...


def load_function(name: str) -> RewardFunction:
    """The function that `module:function` names below the rewards package, and nothing outside it.

    Raises:
        ValueError: another form, an unknown module, no public function of that name defined there, or one that does
            not take columns it has no use for.
    """
    module_name, colon, function_name = name.partition(":")
    modules = sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name not in NO_REWARDS)
    if not colon or not function_name:
        raise ValueError(
            f"reward function: got {name!r}, expected MODULE:FUNCTION such as text:finished_sentence; put the module "
            "below rewards/ that has the function in front of it"
        )
    if module_name not in modules:
        raise ValueError(
            f"reward function: got module {module_name!r}, {_choice(module_name, _with_rewards(modules))}"
        )
    module = importlib.import_module(f"rewards.{module_name}")
    functions = {
        key: value
        for key, value in inspect.getmembers(module, inspect.isfunction)
        if value.__module__ == module.__name__ and _takes_texts(value)
    }
    if not functions:
        known = _choice(module_name, _with_rewards(modules))
        raise ValueError(f"reward function: got module {module_name!r}, which has no reward functions, {known}")
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


def only_where(check: Callable[..., object]) -> Callable[[Function], Function]:
    """Let `check(**settings)` refuse, before a run starts, what the function would refuse on its first call."""

    def mark(function: Function) -> Function:
        vars(function)["check"] = check
        return function

    return mark


def only_rows(check: Callable[..., object]) -> Callable[[Function], Function]:
    """Let `check(**values)` look at every row before a run starts: it refuses what the function would refuse, and
    returns False for a row of which no answer could have a score.

    Its parameters are columns and settings of the function by name, None for a column that the row does not have, and
    `prompt`, the text that an answer answers.
    """

    def mark(function: Function) -> Function:
        vars(function)["row"] = check
        return function

    return mark


def at_most(longest: Callable[..., float]) -> Callable[[Function], Function]:
    """Let `longest(samples, **settings)` tell how many seconds a call for so many answers may take if all is well in
    the end: a time limit that would cut it off is refused."""

    def mark(function: Function) -> Function:
        vars(function)["longest"] = longest
        return function

    return mark


def reads_columns(setting: str) -> Callable[[Function], Function]:
    """Say which setting lists columns that the function needs beside those it has parameters for."""

    def mark(function: Function) -> Function:
        vars(function)["reads"] = setting
        return function

    return mark


def check_settings(
    name: str, function: Callable[..., Any], settings: Mapping[str, Any], *, key: str = "reward.functions"
) -> None:
    """Refuse settings that the function `name` does not have, or of another type than it says; then ask its own check.

    `key`: of the config that names the function.

    Raises:
        ValueError: an unknown setting, one that is given by every call, a wrong type, a number that is not finite, or
            what the check refuses.
    """
    from pydantic import TypeAdapter, ValidationError  # which the processes that run the functions do without

    own = {p.name: p for p in _own_parameters(function)}
    hints = get_type_hints(function)
    for setting, value in settings.items():
        if setting in SAMPLED or setting not in own:
            known = sorted(set(own) - set(SAMPLED))
            expected = _choice(setting, known) if known else "expected none: it has no settings; remove it"
            raise ValueError(f"{key}: got a setting {setting!r} of {name}, {expected}")
        if not _is_finite(value):
            raise ValueError(
                f"{key}: got {setting}: {value!r} as a setting of {name}, expected finite numbers; correct it"
            )
        try:
            TypeAdapter(hints.get(setting, Any)).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            if _takes_column(own[setting]):
                raise ValueError(
                    f"{key}: got {setting}: {value!r} as a setting of {name}, expected a column {setting!r} in the "
                    "data, which has one value per row; remove the setting and give the rows that column"
                ) from None
            raise ValueError(
                f"{key}: got {setting}: {value!r} as a setting of {name}, expected "
                f"{inspect.formatannotation(hints[setting])} ({error.errors()[0]['msg']}); correct it"
            ) from None
    if check := getattr(function, "check", None):
        taken = inspect.signature(check).parameters
        everything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        whole = with_defaults(function, settings)
        try:
            check(**{setting: value for setting, value in whole.items() if everything or setting in taken})
        except ValueError as error:
            raise ValueError(f"{key}: {name}: {error}") from error


def check_time_limit(
    name: str,
    function: Callable[..., Any],
    settings: Mapping[str, Any],
    *,
    time_limit: float,
    samples_per_call: int,
    key: str = "reward.functions",
) -> None:
    """Refuse a limit that would end the function `name` while it still waits or tries again as its settings say.

    Raises:
        ValueError: such a limit.
    """
    longest = getattr(function, "longest", None)
    seconds = longest(samples_per_call, **with_defaults(function, settings)) if longest is not None else 0.0
    if time_limit < seconds:
        raise ValueError(
            f"{key}: got a time_limit of {time_limit:g} s for {name}, expected at least {seconds:g} s: so "
            f"long a call for {samples_per_call} answers may take by its settings; raise time_limit, or lower "
            "samples_per_call, or the settings timeout, retries and max_wait"
        )


def with_defaults(function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a function: those given, and the defaults of the others."""
    defaults = {p.name: p.default for p in _own_parameters(function) if p.default not in (p.empty, None)}
    return {**defaults, **settings}


def check_columns(
    name: str,
    function: Callable[..., Any],
    columns: Collection[str],
    settings: Mapping[str, Any] | None = None,
    *,
    key: str = "reward.functions",
) -> None:
    """Refuse columns of the data that the function `name` cannot be called with.

    Args:
        settings: what the config gives a value.
        key: of the config that names the function.

    Raises:
        ValueError: a column that it needs is missing, replaces one of its settings, or has a reserved name.
    """
    refuse_reserved(columns)
    settings = settings or {}
    for column in settings.get(getattr(function, "reads", ""), ()):
        if column not in {*columns, *SAMPLED}:
            raise ValueError(
                f"{key}: got {name} with a column {column!r} to read, expected one of "
                f"{sorted({*columns, *SAMPLED})}; correct the name, or add that column"
            )
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
        if not _takes_column(parameter) and parameter.name in columns:
            raise ValueError(
                f"{key}: got a column {parameter.name!r} in the data, expected none of that name: it is a "
                f"setting of {name}, {parameter.default!r} by default; rename the column"
            )


def check_rows(
    name: str,
    function: Callable[..., Any],
    rows: Iterable[tuple[str, str, Mapping[str, Any]]],
    settings: Mapping[str, Any],
    *,
    max_unscorable: float,
    key: str = "reward.functions",
) -> None:
    """Refuse rows by which the function `name` would fail, and too many of which no answer could have a score.

    Args:
        rows: where each stands, for messages; its prompt; its columns.
        max_unscorable: share of the rows that may have no score.
        key: of the config that names the function.

    Raises:
        ValueError: naming the first such row.
    """
    check = getattr(function, "row", None)
    if check is None:
        return
    whole, without, count = with_defaults(function, settings), [], 0
    for where, prompt, columns in rows:
        count += 1
        values = {"prompt": prompt, **columns, **whole}
        try:
            if check(**{wanted: values.get(wanted) for wanted in inspect.signature(check).parameters}) is False:
                without.append(where)
        except ValueError as error:
            raise ValueError(f"{where}: {key}: {name}: {error}") from error
    if len(without) > max_unscorable * count:
        needed = " or ".join(repr(p.name) for p in _own_parameters(function) if p.default is p.empty)
        raise ValueError(
            f"{without[0]}: {key}: got {len(without)} of {count} rows, this one first, without {needed} that {name} "
            f"can compare an answer with, expected at most {max_unscorable:.0%}; mend or remove them, or raise "
            "reward.max_unscorable"
        )


def refuse_reserved(columns: Collection[str]) -> None:
    """Refuse a column by whose name reward functions are given something else."""
    if taken := sorted(set(columns) & set(RESERVED)):
        raise ValueError(
            f"reward.functions: got a column {taken[0]!r} in the data, expected none of {', '.join(RESERVED)}: "
            "reward functions are given their own; rename the column"
        )


def columns_read(function: Callable[..., Any], settings: Mapping[str, Any] | None = None) -> frozenset[str]:
    """Columns of the data that a function looks at: those of its signature, and those that its settings name."""
    settings = settings or {}
    named = {parameter.name for parameter in _own_parameters(function)} - set(settings)
    return frozenset({*named, *settings.get(getattr(function, "reads", ""), ())} - set(SAMPLED))


def _own_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those beside the prompts, the responses and `**columns`."""
    named = list(inspect.signature(function).parameters.values())[2:]
    return [p for p in named if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _takes_column(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty or parameter.default is None


def _is_finite(value: Any) -> bool:
    """Whether all numbers in a value of JSON are finite floats, or integers no larger than those."""
    if isinstance(value, int | float):
        return abs(value) <= sys.float_info.max
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return all(map(_is_finite, inner))


def _with_rewards(modules: Iterable[str]) -> list[str]:
    """Those that have reward functions, read and not imported: some need packages that are not installed."""
    there = []
    for module in modules:
        tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
        functions = (one for one in tree.body if isinstance(one, ast.FunctionDef))
        if any([arg.arg for arg in one.args.args[:2]] == ["prompts", "responses"] for one in functions):
            there.append(module)
    return there


def _takes_texts(function: Callable[..., Any]) -> bool:
    return list(inspect.signature(function).parameters)[:2] == ["prompts", "responses"]


def _choice(got: str, known: Any) -> str:
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.4)
    return f"expected one of {sorted(known)}; " + (f"did you mean {near[0]!r}?" if near else "choose one of them")
