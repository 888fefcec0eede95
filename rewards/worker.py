"""A process that runs reward functions: `rewards.pool` starts it, asks it, and ends it when it does not answer.

Messages go both ways over one socket: four bytes of length, then that much JSON. Nothing is unpickled.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.base import MEASURED, Part, RewardFunction, fits, load_function

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
MESSAGE_CHARACTERS = 300
"""Of an exception's message that are passed on."""
KIND = re.compile("[a-z_]{1,32}")
COUNT = re.compile("[a-z][a-z0-9_]{0,63}")
"""Kinds of failures and names of counts end up in the names of metrics."""


def encode(message: Any) -> bytes:
    """A message as it travels.

    Raises:
        TypeError: something in it that JSON cannot say.
    """
    body = json.dumps(message).encode()
    return len(body).to_bytes(4, "big") + body


def main() -> None:
    own = os.getpid()
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    end_with_parent(int(sys.argv[2]))
    keep_descendants()
    start = _receive(channel)
    if start is None:
        return
    _limit(start["memory_mb"])
    try:
        functions = {part: (load_function(one["name"]), one["settings"]) for part, one in start["functions"].items()}
    except Exception as error:
        _say(channel, {"refused": _described(error)}, own)
        return
    _say(channel, {"ready": True}, own)
    while (request := _receive(channel)) is not None:
        said = answer(*functions[request["part"]], request)
        _say(channel, {"call": request["call"], **said}, own)


def _say(channel: socket.socket, message: Any, own: int) -> None:
    """Send it, unless this is a child that a function forked and let return: that one ends here, unheard."""
    if os.getpid() != own:
        os._exit(1)
    channel.sendall(encode(message))


def end_with_parent(parent: int) -> None:
    """Be killed when the thread that started this process ends, in whatever way; without Linux, when it is next read
    from the socket."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def keep_descendants() -> None:
    """Stay the ancestor of what a function starts and leaves behind, so that it is found and ended with this one."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def answer(function: RewardFunction, settings: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """`{"numbers": [...]}`, a number or a failure for each response, with `counts` where the function has some; or
    `{"failure": ...}` for all of them."""
    own, expected = os.getpid(), len(request["responses"])  # before the function changes what it is given
    random.seed(0)  # the same numbers whichever process is asked, and whatever it was asked before
    try:
        said = function(request["prompts"], request["responses"], **request["columns"], **settings)
        part = said if isinstance(said, Part) else Part(said)
        numbers = part.numbers
        if not isinstance(numbers, Sequence) or isinstance(numbers, str):
            return {"failure": f"invalid: got {type(numbers).__name__}, expected a list of numbers"}
        if len(numbers) != expected:
            return {"failure": f"invalid: got {len(numbers)} numbers, expected {expected}, one per response"}
        if not all(COUNT.fullmatch(name) and name not in MEASURED and fits(n) for name, n in part.counts.items()):
            got, taken = repr(part.counts)[:MESSAGE_CHARACTERS], ", ".join(sorted(MEASURED))
            return {"failure": f"invalid: got counts {got}, expected numbers under names of a-z, 0-9, _, not {taken}"}
        told = [_plain(number, part.failures.get(i)) for i, number in enumerate(numbers)]
        return {"numbers": told, **({"counts": part.counts} if part.counts else {})}
    except MemoryError:
        return {"failure": "memory: more than reward.execution.memory_mb"}
    except BaseException as error:  # of code that anyone may write: the one place for a broad catch
        if os.getpid() != own:  # a child that the function forked ends as it would elsewhere
            raise
        return {"failure": f"error: {_described(error)}"}


def _plain(number: Any, failure: str | None) -> float | str:
    if number is None:
        told = failure or "none: the function gave no number"
        if not KIND.fullmatch(told.partition(":")[0]):
            told = f"invalid: got the reason {told!r}, expected KIND: WHAT HAPPENED with a KIND of a-z and _"
        return told[:MESSAGE_CHARACTERS]
    if fits(number):
        return float(number)
    return f"invalid: got {repr(number)[:MESSAGE_CHARACTERS]}, expected a finite number that float32 can hold, or None"


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:MESSAGE_CHARACTERS]}{where}"


def _limit(memory_mb: int) -> None:
    """Bound the memory, leave no core files, and be the first that a machine without memory ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")


def _receive(channel: socket.socket) -> Any:
    """The next message; None once the other side is gone."""
    head = _read(channel, 4)
    body = _read(channel, int.from_bytes(head, "big")) if head else b""
    return json.loads(body) if body else None


def _read(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = channel.recv(min(size - len(data), 1 << 20))
        if not piece:
            return b""
        data += piece
    return bytes(data)


if __name__ == "__main__":
    main()
