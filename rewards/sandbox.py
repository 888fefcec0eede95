"""Test programs that a model wrote, where they can do no harm and cannot see what they are tested with.

A program runs once per test, in a process of its own behind `rewards.jail`, and is handed the input alone. What it
answers is compared with the expected value out here, so there is nothing in there to read, patch or forge.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rewards.base import only_rows, only_where

JAIL = Path(__file__).with_name("jail.py")
GRACE = 10.0
"""Seconds that starting and ending a program may take on top of its own limit."""
START_LIMIT = 30.0
"""Seconds for the trial program that shows whether there is a sandbox."""
LONGEST_OUTPUT = 1 << 18
"""Bytes that a program may print."""
TRIAL = """
import os, socket
try:
    socket.create_connection(("192.0.2.1", 9), timeout=1)
    network = "open"
except OSError as error:
    network = error.errno
seen = [path for path in ("/etc/passwd", "/etc/shadow", "/home", "/proc/1") if os.path.exists(path)]
print(network, seen, dict(os.environ), os.getuid() != 0, os.getpid())
"""
CONTAINED = "101 [] {} True 2\n"


class SandboxError(RuntimeError):
    """The sandbox itself failed; nothing is known about the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one program may take."""

    time_limit: float = 5.0
    """Seconds on the clock."""
    memory_mb: int = 256
    """Address space of each of its processes."""
    processes: int = 4
    """At a time, threads included, itself included."""
    disk_mb: int = 16
    """Of its own folder, which is memory."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    kind: Literal["done", "failed", "crash", "timeout", "output"]
    """`done` is exit code 0 and `failed` another one, `crash` a signal, `output` more than it may print."""
    stdout: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramTest:
    """Standard input and what must be printed; or a function, its arguments, and what it must return."""

    stdin: str = ""
    stdout: str | None = None
    function: str | None = None
    args: str = "()"
    """A Python literal."""
    kwargs: str = "{}"
    returns: Any = None


def check_sandbox(*, time_limit: float = 5.0, memory_mb: int = 256, processes: int = 4) -> None:
    """Refuse a machine on which a program cannot be contained, by trying.

    Raises:
        ValueError: what the machine does not allow.
    """
    if time_limit <= 0 or memory_mb < 64 or processes < 1:
        raise ValueError(
            f"sandbox: got time_limit {time_limit:g}, memory_mb {memory_mb} and processes {processes}, expected more "
            "than 0 seconds, at least 64 MB and at least 1 process; raise them"
        )
    remedy = (
        "run on Linux as root with CAP_SYS_ADMIN, or as a user who may make user namespaces "
        "(kernel.unprivileged_userns_clone, user.max_user_namespaces); or take the function out of reward.functions"
    )
    try:
        outcome = run_program(TRIAL, limits=Limits(time_limit=START_LIMIT, memory_mb=memory_mb, processes=processes))
    except (SandboxError, OSError) as error:
        raise ValueError(f"sandbox: got {error}, expected namespaces of its own for a program; {remedy}") from error
    if (outcome.kind, outcome.stdout) != ("done", CONTAINED):
        said = outcome.stdout.strip() or outcome.detail
        raise ValueError(f"sandbox: got a trial program that says {said!r}, expected {CONTAINED.strip()!r}; {remedy}")


def check_tests(*, tests: Any) -> bool:
    """Whether a row has tests. Raises ValueError for one of another form."""
    if tests is not None and not isinstance(tests, list | tuple):
        raise ValueError(f"tests: got {str(tests)[:200]!r}, expected a list of tests; correct the row")
    return bool([read_test(one) for one in tests or ()])


@only_rows(check_tests)
@only_where(check_sandbox)
def passes_tests(
    prompts: list[str],
    responses: list[str],
    *,
    tests: list[Any],
    time_limit: float = 5.0,
    memory_mb: int = 256,
    processes: int = 4,
    partial: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 where the program in the last fenced block of an answer passes every test of its row, else 0.

    A test is `{"stdin": ..., "stdout": ...}`, or `{"function": ..., "args": [...], "returns": ...}`, or text of the
    form `assert f(1, 2) == 3` with literals on both sides. Printed lines are compared without white space at their
    ends, returned numbers to nine digits; tuples and lists are the same. None for a row without tests.

    Args:
        tests: of each row, a list.
        time_limit: seconds for one test.
        memory_mb: address space of each process of a program.
        processes: at a time, threads included.
        partial: give the share of the tests that it passes instead.

    Raises:
        ValueError: a test that is none of these.
        SandboxError: a program that could not be contained. Nothing is said of its answer then.
    """
    limits = Limits(time_limit=time_limit, memory_mb=memory_mb, processes=processes)
    return [
        _share(last_program(response), [read_test(one) for one in own], limits, partial) if own else None
        for response, own in zip(responses, tests, strict=True)
    ]


def _share(program: str | None, tests: Sequence[ProgramTest], limits: Limits, partial: bool) -> float:
    if program is None:
        return 0.0
    if partial:
        return sum(passes(program, test, limits) for test in tests) / len(tests)
    return float(all(passes(program, test, limits) for test in tests))


def last_program(response: str) -> str | None:
    """The contents of the last fenced block that is closed; None without one."""
    found: str | None = None
    inside: list[str] | None = None
    for line in response.replace("\r\n", "\n").split("\n"):  # a program may hold other signs that end a line
        if not line.lstrip().startswith("```"):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            inside = []
        else:
            found, inside = "\n".join(inside) + "\n", None
    return found


def read_test(test: Any) -> ProgramTest:
    """One test as a data set writes it.

    Raises:
        ValueError: another form.
    """
    if isinstance(test, dict):
        if set(test) in ({"stdin", "stdout"}, {"stdout"}) and all(isinstance(text, str) for text in test.values()):
            return ProgramTest(**test)
        if {"function", "returns"} <= set(test) <= {"function", "args", "kwargs", "returns"}:
            args, kwargs = test.get("args", ()), test.get("kwargs", {})
            if isinstance(test["function"], str) and isinstance(args, list | tuple) and isinstance(kwargs, dict):
                with contextlib.suppress(ValueError):
                    return _call(test["function"], args, kwargs, test["returns"])
    if isinstance(test, str):
        with contextlib.suppress(SyntaxError, ValueError, TypeError):
            return _read_assertion(test)
    raise ValueError(
        f"tests: got {str(test)[:200]!r}, expected stdin and stdout, or function, args and returns, or the text "
        "`assert f(1, 2) == 3` of literals; rewrite the test"
    )


def _read_assertion(text: str) -> ProgramTest:
    match ast.parse(text.strip()).body:
        case [ast.Assert(test=ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[expected]))]:
            if isinstance(call.func, ast.Name):
                args = [ast.literal_eval(arg) for arg in call.args]
                kwargs = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
                return _call(call.func.id, args, kwargs, ast.literal_eval(expected))
    raise ValueError("no such assertion")


def _call(function: str, args: Sequence[Any], kwargs: dict[Any, Any], returns: Any) -> ProgramTest:
    """A test of a function, whose arguments the program can be told and whose value can be compared.

    Raises:
        ValueError: NaN, an infinity, or something that JSON cannot say: every program would fail it.
    """
    test = ProgramTest(function=function, args=repr(tuple(args)), kwargs=repr(kwargs), returns=returns)
    try:
        ast.literal_eval(test.args), ast.literal_eval(test.kwargs)
        json.dumps(_plain(returns), allow_nan=False)
    except (TypeError, SyntaxError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not all(isinstance(name, str) for name in kwargs):
        raise ValueError("an argument without a name")
    return test


def passes(program: str, test: ProgramTest, limits: Limits) -> bool:
    """Whether the program does what the test asks. One that crashes or takes too much does not."""
    if test.function is None:
        outcome = run_program(program, stdin=test.stdin, limits=limits)
        return outcome.kind == "done" and _lines(outcome.stdout) == _lines(test.stdout or "")
    call = {"name": test.function, "args": test.args, "kwargs": test.kwargs}
    outcome = run_program(program, function=call, limits=limits)
    try:
        return outcome.kind == "done" and _same(json.loads(outcome.stdout), _plain(test.returns))
    except (ValueError, RecursionError):
        return False


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _plain(value: Any) -> Any:
    """As `rewards.jail.plain`, which runs in there, where the program could replace it."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(one) for one in value), key=json.dumps)
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _same(got: Any, expected: Any) -> bool:
    if isinstance(expected, bool) or isinstance(got, bool) or isinstance(expected, str | None):
        return type(got) is type(expected) and bool(got == expected)
    if isinstance(expected, int | float):
        if not isinstance(got, int | float):
            return False
        if got == expected or not isinstance(got, float):
            return got == expected
        try:
            return math.isclose(got, expected, rel_tol=1e-9)
        except OverflowError:  # beyond any float
            return False
    if isinstance(expected, list):
        return isinstance(got, list) and len(got) == len(expected) and all(map(_same, got, expected))
    assert isinstance(expected, dict)
    return isinstance(got, dict) and set(got) == set(expected) and all(_same(got[k], expected[k]) for k in got)


def run_program(
    program: str, *, stdin: str = "", function: dict[str, str] | None = None, limits: Limits = Limits()
) -> Outcome:
    """Run Python source in the sandbox and collect what it prints, or what `function` of it returns, as JSON.

    Nothing of the program is alive when this returns.

    Raises:
        SandboxError: the program could not be contained and was not run, or its processes do not end.
    """
    if sys.platform != "linux":
        raise SandboxError(f"the platform {sys.platform}")
    request = {
        "program": program,
        "stdin": stdin,
        "function": function,
        "parent": os.getpid(),
        "time_limit": limits.time_limit,
        "memory_mb": limits.memory_mb,
        "disk_mb": limits.disk_mb,
        "processes": limits.processes,
    }
    status, theirs = os.pipe()
    with os.fdopen(status, "rb") as said:
        launcher = subprocess.Popen(
            [os.path.realpath(sys.executable), "-sPSB", "-Xutf8", str(JAIL), str(theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs,),
            env={"PYTHONHASHSEED": "0"},
        )
        os.close(theirs)
        with launcher:
            printed = _talk(launcher, json.dumps(request).encode(), time.monotonic() + limits.time_limit + GRACE)
        ended: dict[str, Any] = json.loads(said.read() or b'{"refused": "a launcher that failed"}')
    return _outcome(ended, printed)


def _talk(launcher: subprocess.Popen[bytes], request: bytes, deadline: float) -> bytes:
    """Hand the request over, take what is printed, and see the launcher out; it leaves nothing behind."""
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    with contextlib.suppress(BrokenPipeError), launcher.stdin:
        launcher.stdin.write(request)
    printed = bytearray()
    try:
        while select.select([launcher.stdout], [], [], max(deadline - time.monotonic(), 0.0))[0]:
            piece = os.read(launcher.stdout.fileno(), 1 << 16)
            printed += piece
            if not piece:
                break
            if len(printed) > LONGEST_OUTPUT:
                launcher.send_signal(signal.SIGTERM)
                break
        launcher.stdout.close()
        launcher.wait(max(deadline - time.monotonic(), GRACE))
    except subprocess.TimeoutExpired:
        raise SandboxError("a program that does not end") from None
    finally:
        if launcher.poll() is None:
            launcher.kill()
    return bytes(printed)


def _outcome(ended: dict[str, Any], printed: bytes) -> Outcome:
    text = printed[:LONGEST_OUTPUT].decode(errors="replace")
    if "refused" in ended:
        raise SandboxError(str(ended["refused"]))
    if len(printed) > LONGEST_OUTPUT:
        return Outcome("output", text, f"more than {LONGEST_OUTPUT} bytes")
    if "timeout" in ended:
        return Outcome("timeout", text, "out of time")
    code = ended["code"]
    if code < 0:
        return Outcome("crash", text, signal.Signals(-code).name)
    return Outcome("failed" if code else "done", text, f"exit code {code}" if code else "")
