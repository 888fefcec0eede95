"""Reward functions in processes of their own, which are ended when they do not answer.

A function that hangs, crashes or takes all memory costs the answers it was asked about, each with the reason, and
nothing else. A call for several answers that fails is made again for each of them alone, in a process that is alive:
so the one that did it is known, and the others keep their numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.base import Part
from rewards.worker import encode

START_LIMIT = 120.0
"""Seconds that a process has to load its functions."""
END_LIMIT = 10.0
"""Seconds after which a process that was killed must be gone."""
PIECE = 1 << 16
LONGEST_ANSWER = 1 << 24
"""Bytes of one answer."""
OUTPUT_SHOWN = 2000
"""Bytes that a function may print in one call; the rest is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFunction:
    """A reward function as the pool runs it."""

    name: str
    """`module:function`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    time_limit: float = 10.0
    """Seconds for one call."""
    samples_per_call: int = 32


@dataclass(frozen=True, slots=True)
class _Call:
    """Some answers for one function."""

    part: str
    indices: range
    message: bytes
    again: bool
    """Whether it is made because an earlier one failed."""
    id: str
    """Random; its answer repeats it. What a child that a function forked says late is the answer to nothing."""


class RewardPool:
    """`num_workers` processes, started once. The scores do not depend on their number."""

    def __init__(self, functions: Mapping[str, PoolFunction], *, num_workers: int = 1, memory_mb: int = 8192) -> None:
        """`functions`: by the name of their part. `memory_mb`: address space of a process."""
        self.functions, self.num_workers = dict(functions), num_workers
        wanted = {part: {"name": one.name, "settings": dict(one.settings)} for part, one in functions.items()}
        self._start_message = encode({"functions": wanted, "memory_mb": memory_mb})
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._closed = False
        # The processes end with the thread that started them: all are started by this one, which lives until the end.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")

    def start(self) -> None:
        """Wait until every process has loaded the functions.

        Raises:
            ValueError: a function that cannot be loaded.
            RuntimeError: a process that ended while it was starting.
        """
        self._thread.submit(self._run, deque(), {}).result()

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Future[dict[str, Part]]:
        """What every function says of every response, by part. A failure's kind is the function's own or one of
        timeout, crash, memory, error, invalid, none. What a process that had to be ended was counting is lost.

        Raises:
            ValueError: a column with values that are no plain data.
        """
        texts = (prompts, responses, columns)
        calls = deque(
            self._call(part, range(start, min(start + one.samples_per_call, len(responses))), *texts)
            for part, one in self.functions.items()
            for start in range(0, len(responses), one.samples_per_call)
        )
        said = {part: _Said([None] * len(responses), {}, Counter()) for part in self.functions}

        def run() -> dict[str, Part]:
            try:
                self._run(calls, said, texts)
            except BaseException:
                self._end_all()  # or an answer that is still to come would be taken for one of the next call
                raise
            return {part: Part(one.numbers, one.failures, dict(one.counts)) for part, one in said.items()}

        return self._thread.submit(run)

    def close(self) -> None:
        """End all processes, once; what is being scored is given up."""
        if not self._closed:
            self._closed = True
            self._thread.submit(self._end_all).result()
            self._thread.shutdown()
            self._selector.close()

    def _end_all(self) -> None:
        while self._workers:
            self._workers.pop().end()

    def _call(
        self,
        part: str,
        indices: range,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        *,
        again: bool = False,
    ) -> _Call:
        message = {
            "call": (own := secrets.token_hex(8)),
            "part": part,
            "prompts": [prompts[i] for i in indices],
            "responses": [responses[i] for i in indices],
            "columns": {name: [values[i] for i in indices] for name, values in columns.items()},
        }
        try:
            return _Call(part, indices, encode(message), again, own)
        except TypeError as error:
            raise ValueError(
                f"reward.functions: got a column with values that are no plain data ({error}), expected text, "
                "numbers, true, false, null, lists and mappings; convert them in the data"
            ) from None

    def _run(self, calls: deque[_Call], said: dict[str, _Said], texts: tuple[Any, ...] = ()) -> None:
        """Hand out the calls until every one is answered or has failed."""
        while not self._closed:
            for _ in range(self.num_workers - len(self._workers)):
                self._workers.append(_Worker(self._start_message, self._selector))
            self._listen(wait=not (calls and any(worker.idle for worker in self._workers)))
            for worker in [w for w in self._workers if w.failure or w.answers or w.deadline <= time.monotonic()]:
                for call, answer in self._settled(worker):
                    calls.extend(self._alone(call, texts) if _is_unclear(call, answer) else ())
                    if not _is_unclear(call, answer):
                        said[call.part].add(call.indices, answer)
            for worker in self._workers:
                if worker.idle and calls:
                    worker.ask(call := calls.popleft(), self.functions[call.part].time_limit)
            if len(self._workers) == self.num_workers and all(worker.idle for worker in self._workers):
                return
        raise RuntimeError("rewards: got a closed pool, expected an open one; score before it is closed")

    def _listen(self, *, wait: bool) -> None:
        """Take in what the processes say. Now and then the wait ends without news: the pool may have been closed."""
        seconds = min(worker.deadline for worker in self._workers) - time.monotonic() if wait else 0.0
        for key, events in self._selector.select(min(max(seconds, 0.0), 0.2)):
            worker, what = key.data
            worker.react(what, events)

    def _alone(self, call: _Call, texts: tuple[Any, ...]) -> list[_Call]:
        return [self._call(call.part, range(i, i + 1), *texts, again=True) for i in call.indices]

    def _settled(self, worker: _Worker) -> Iterator[tuple[_Call, Mapping[str, Any]]]:
        """The answer to the worker's call, if it had one. A worker that failed is ended; another takes its place."""
        answers, worker.answers = worker.answers, []
        for answer in answers:
            if "refused" in answer and not worker.ready:
                self._drop(worker)
                raise ValueError(f"reward.functions: {answer['refused']}")
            if "ready" in answer and not worker.ready:
                worker.rest()
            elif (call := worker.call) is not None and answer.get("call") == call.id:
                worker.rest()
                yield call, answer
            else:
                worker.failure = "crash: an answer to another call"
        if answers and not worker.failure:
            return
        started, call = worker.ready, worker.call
        failure = self._drop(worker)
        if not started:
            raise RuntimeError(f"a process for reward functions did not start: {failure}")
        if call is not None:
            yield call, {"failure": failure}

    def _drop(self, worker: _Worker) -> str:
        self._workers.remove(worker)
        if not worker.failure:
            limit = START_LIMIT if worker.call is None else self.functions[worker.call.part].time_limit
            worker.end()
            return f"timeout: no answer within {limit:g} s"
        return f"{worker.failure}: {worker.end()}"


def _is_unclear(call: _Call, answer: Mapping[str, Any]) -> bool:
    """Whether it is open which answer the failure is due to. A crash may be due to none of them: the process may have
    been killed from outside."""
    failure = answer.get("failure", "")
    return bool(failure) and (len(call.indices) > 1 or (failure.startswith("crash") and not call.again))


@dataclass(frozen=True, slots=True)
class _Said:
    """A `Part` while its calls come in."""

    numbers: list[float | None]
    failures: dict[int, str]
    counts: Counter[str]

    def add(self, indices: range, answer: Mapping[str, Any]) -> None:
        told = [answer["failure"]] * len(indices) if "failure" in answer else answer["numbers"]
        for index, number in zip(indices, told, strict=True):
            if isinstance(number, str):
                self.failures[index] = number
            else:
                self.numbers[index] = number
        self.counts.update(answer.get("counts", {}))


class _Worker:
    """One process, as the pool sees it."""

    def __init__(self, start_message: bytes, selector: selectors.BaseSelector) -> None:
        self._socket, theirs = socket.socketpair()
        self._output, write = os.pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-uPm", "rewards.worker", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                pass_fds=(theirs.fileno(),),
                env=_environment(),
                start_new_session=True,
            )
        os.close(write)
        self._socket.setblocking(False)
        os.set_blocking(self._output, False)
        self._selector = selector
        selector.register(self._socket, selectors.EVENT_READ, (self, "answer"))
        selector.register(self._output, selectors.EVENT_READ, (self, "output"))
        self.ready, self.failure = False, ""
        self.call: _Call | None = None
        self.answers: list[Mapping[str, Any]] = []
        self._received = bytearray()
        self._shown = 0
        self._send(start_message, START_LIMIT)

    @property
    def idle(self) -> bool:
        return self.ready and self.call is None and not self.failure

    def ask(self, call: _Call, time_limit: float) -> None:
        self.call, self._shown = call, 0
        self._send(call.message, time_limit)

    def rest(self) -> None:
        """It has answered, and waits to be asked."""
        self.ready, self.call, self.deadline = True, None, float("inf")

    def _send(self, message: bytes, limit: float) -> None:
        self.deadline = time.monotonic() + limit
        self._unsent = memoryview(message)
        self._write()

    def _write(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.failure = "crash"
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent and not self.failure else 0)
        self._selector.modify(self._socket, events, (self, "answer"))

    def react(self, what: str, events: int) -> None:
        if what == "output":
            self._drain()
            return
        if events & selectors.EVENT_WRITE:
            self._write()
        if events & selectors.EVENT_READ:
            self._read()

    def _read(self) -> None:
        try:
            piece = self._socket.recv(PIECE)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        self._received += piece
        size = int.from_bytes(self._received[:4], "big")
        if not piece or (len(self._received) >= 4 and size > LONGEST_ANSWER):
            self.failure = "crash"
        elif len(self._received) >= 4 and len(self._received) - 4 >= size:
            self.answers.append(json.loads(self._received[4 : 4 + size]))
            del self._received[: 4 + size]

    def _drain(self) -> None:
        """Pass on the beginning of what the function prints, and let it print the rest."""
        with contextlib.suppress(BlockingIOError):
            piece = os.read(self._output, PIECE)
            if not piece:
                self._selector.unregister(self._output)
            shown = piece[: max(OUTPUT_SHOWN - self._shown, 0)]
            self._shown += len(shown)
            if shown:
                sys.stderr.write(shown.decode(errors="backslashreplace"))

    def end(self) -> str:
        """Kill the process and what it has started; returns how it ended."""
        for file in (self._socket, self._output):
            with contextlib.suppress(KeyError):
                self._selector.unregister(file)
        code = end_tree(self.process)
        self._socket.close()
        os.close(self._output)
        if code < 0:
            return f"the process ended with {signal.Signals(-code).name}"
        return f"the process ended with exit code {code}"


def _environment() -> dict[str, str]:
    """This process' own, with what it imports, and with sets in the same order everywhere."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([*(entry or os.getcwd() for entry in sys.path), root])
    return {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8:backslashreplace"}


def end_tree(process: subprocess.Popen[bytes]) -> int:
    """Kill a session leader, everything in its session and everything that descends from it, and see them gone.

    Returns the leader's exit code: its own where it had ended already.

    Raises:
        RuntimeError: one is still there after END_LIMIT, as in a system call that cannot be interrupted.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGSTOP)  # it starts nothing while the others are looked for
    deadline = time.monotonic() + END_LIMIT
    while rest := _relatives(process.pid):
        for pid in rest:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {sorted(rest)} of a reward function do not end")
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    return process.wait(END_LIMIT)


def _relatives(leader: int) -> set[int]:
    """The living processes in the leader's session or below it, without itself."""
    parents: dict[int, int] = {}
    found = set[int]()
    for entry in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else ():
        try:
            state, parent, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):  # it ended meanwhile
            continue
        if state not in "ZX":
            pid = int(entry.name)
            parents[pid] = int(parent)
            found |= {pid} if int(session) == leader else set()
    while more := {pid for pid, parent in parents.items() if parent in found | {leader}} - found:
        found |= more
    return found - {leader}
