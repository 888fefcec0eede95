"""What all actors are: light to construct, heavy in `setup`, plain Python underneath.

An actor stores its arguments when it is constructed, so that it can be pickled to the process that will run it;
`setup` loads the models there. The same object works in this process (`actors.local`) and as a Ray actor
(`actors.group`), alone or beside the roles it is colocated with.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from actors.rendezvous import Backend, Rendezvous, join_ranks, node_address, open_rendezvous
from alignment.config.cluster import RoleConfig
from alignment.distributed import Alone, Ranks
from alignment.models import quiet_transformers

LEARNERS = frozenset({"policy", "critic", "reward_model"})
"""Roles whose workers are the ranks of one learner, where they learn."""
WHOLE = RoleConfig()
"""Machines of a model that nobody splits."""


class ActorDiedError(RuntimeError):
    """A process of a group is gone."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"{what}: the actor's process died ({reason}); completed steps are on disk: run the same "
            "command again with --resume auto"
        )
        self.reason = reason


class Actor:
    """Base of the five roles."""

    role: str
    peers_needed: tuple[str, ...] = ()
    """Roles that must be set up first when they share this actor's process."""
    machines: RoleConfig = WHOLE
    """How the role's processes share its model."""
    learns = False
    ranks: Ranks = Alone()
    """The processes of this role's group, for one that works together with the others; known from `setup` on."""
    rank = 0
    """Which of the group's processes this is."""

    def meets(self, num_workers: int) -> bool:
        """Whether so many processes need a process group: to learn as one, or to hold one model in parts."""
        if self.learns:
            return num_workers > 1 or self.machines.engine == "deepspeed"
        return num_workers > 1 and self.machines.zero_stage == 3

    @property
    def lockstep(self) -> Ranks | None:
        """The ranks that a model which does not learn is split over, see `alignment.learners.base.per_response`."""
        return self.ranks if self.ranks.size > 1 and self.machines.zero_stage == 3 else None

    def setup(self, peers: Mapping[str, Actor]) -> None:
        """Load models. `peers` are the roles of the same process, set up before this one where possible."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what outlives a call: ports, threads. A Ray process lets go of it by ending."""


class Host:
    """One process and the roles that live in it."""

    def __init__(
        self,
        actors: Mapping[str, Actor],
        *,
        rank: int = 0,
        threads: int | None = None,
        takes_turns: bool = False,
        shares_memory: bool = False,
    ) -> None:
        """
        Args:
            rank: which of the group's processes this is.
            takes_turns: calls of such hosts on one machine run one after the other, see `cpu_turn`.
            shares_memory: other processes of the run need what a call has freed; alone, a host keeps it for its next
                call, since every page given back has to be mapped and zeroed again.
        """
        self.actors = dict(actors)
        for actor in self.actors.values():
            actor.rank = rank
        self.rank = rank
        self._store: Any = None
        self.threads = threads or os.cpu_count() or 1
        self.takes_turns, self.shares_memory = takes_turns, shares_memory

    def open_ranks(self, *, world_size: int, backend: Backend) -> Rendezvous:
        """Rank 0: where the processes of the group meet, in `setup`."""
        rendezvous, self._store = open_rendezvous(node_address(), world_size=world_size, backend=backend)
        return rendezvous

    def setup(self, meeting: Rendezvous | None = None) -> str:
        """Set every role up, those that others need first. Returns a word on where it runs.

        `meeting`: where the group's processes meet; None where they have nothing to say to each other.
        """
        quiet_transformers()
        keep_freed_memory()
        torch.set_num_threads(self.threads)
        if meeting is not None:
            ranks = join_ranks(meeting, rank=self.rank, store=self._store)
            for actor in self.actors.values():
                actor.ranks = ranks
        for _, actor in sorted(self.actors.items(), key=lambda item: len(item[1].peers_needed)):
            actor.setup({role: peer for role, peer in self.actors.items() if peer is not actor})
        return f"pid {os.getpid()}, {self.threads} threads"

    def pid(self) -> int:
        """The process, for who needs to know that it lives, and which one it is."""
        return os.getpid()

    def call(self, role: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """`actors[role].method(...)`. Threads are set again because in-process hosts share one torch."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        with cpu_turn() if self.takes_turns else contextlib.nullcontext():
            try:
                return getattr(self.actors[role], method)(*args, **kwargs)
            finally:
                if self.shares_memory:
                    give_back_freed_memory()


@contextlib.contextmanager
def cpu_turn() -> Iterator[None]:
    """Hold this user's turn on the machine's cores.

    Processes that each run a thread on every core do not share them well: at every barrier of a matrix product one
    waits for a thread that the other has displaced, and two together take three times as long as one after the other.
    """
    file = os.open(_own_folder() / "cpu-turn.lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _own_folder() -> Path:
    """A folder on this machine that no other user can write to; a home folder may be shared between machines."""
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"raylign-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ValueError(
            f"got {folder}, which others own or may write to, expected a folder of this user's own; "
            "remove it, or set TMPDIR to another folder"
        )
    return folder


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks while a call runs instead of returning each to the kernel.

    Every activation is a block of megabytes; by default each is mapped, zeroed page by page and unmapped again, which
    costs a fifth of a training step on the CPU.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Between calls: the other roles on this machine need it next."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def choose_device(gpus_per_worker: float) -> str:
    """The device of a role: the GPU that Ray (or the user) made visible, or the CPU."""
    if gpus_per_worker > 0:
        return "cuda"
    return "cpu"


class UpdateOnce:
    """Answers a repeated step from memory, so that a retried call cannot make a second optimiser step."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._answer: Any = None

    def __call__(self, step: int, update: Callable[[], Any]) -> Any:
        if step != self._step:
            self._answer = update()
            self._step = step
        return self._answer
