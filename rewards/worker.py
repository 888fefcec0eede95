"""A process that runs reward functions: `rewards.pool` starts it, asks it, and ends it when it does not answer.

Messages go both ways over one socket: four bytes of length, then that much JSON. Nothing is unpickled.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from rewards.base import Part, RewardFunction, load_function

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
MESSAGE_CHARACTERS = 300
"""Of an exception's message that are passed on."""


def encode(message: Any) -> bytes:
    """A message as it travels.

    Raises:
        TypeError: something in it that JSON cannot say.
    """
    body = json.dumps(message).encode()
    return len(body).to_bytes(4, "big") + body


def main() -> None:
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
        channel.sendall(encode({"refused": _described(error)}))
        return
    channel.sendall(encode({"ready": True}))
    while (request := _receive(channel)) is not None:
        channel.sendall(encode(answer(*functions[request["part"]], request)))


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
    prompts, responses = request["prompts"], request["responses"]
    random.seed(0)  # the same numbers whichever process is asked, and whatever it was asked before
    try:
        said = function(prompts, responses, **request["columns"], **settings)
        part = said if isinstance(said, Part) else Part(said)
        numbers = part.numbers
        if not isinstance(numbers, Sequence) or isinstance(numbers, str):
            return {"failure": f"invalid: got {type(numbers).__name__}, expected a list of numbers"}
        if len(numbers) != len(responses):
            return {"failure": f"invalid: got {len(numbers)} numbers, expected {len(responses)}, one per response"}
        if not all(isinstance(n, Real) and math.isfinite(n) for n in part.counts.values()):
            return {"failure": f"invalid: got counts {repr(part.counts)[:MESSAGE_CHARACTERS]}, expected numbers"}
        told = [_plain(number, part.failures.get(i)) for i, number in enumerate(numbers)]
        return {"numbers": told, **({"counts": part.counts} if part.counts else {})}
    except MemoryError:
        return {"failure": "memory: more than reward.execution.memory_mb"}
    except BaseException as error:  # of code that anyone may write: the one place for a broad catch
        return {"failure": f"error: {_described(error)}"}


def _plain(number: Any, failure: str | None) -> float | str:
    if number is None:
        return (failure or "none: the function gave no number")[:MESSAGE_CHARACTERS]
    try:
        if isinstance(number, Real) and not isinstance(number, bool) and math.isfinite(number):
            return float(number)
    except OverflowError:
        pass
    return f"invalid: got {repr(number)[:MESSAGE_CHARACTERS]}, expected a finite number or None"


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
