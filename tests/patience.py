"""A guard against work that explodes with the length of a text: a hang, not a measurement."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_explosion(seconds: float = 1.0) -> Iterator[None]:
    """Asserts that the block takes at most `seconds` of this thread's processor time.

    The limit is twenty times what the slowest block takes, and work that grows with the square of a million characters
    takes a thousand times as long. The garbage of earlier tests and other threads do not count; speed is measured by
    benchmarks/rewards.py.
    """
    gc.disable()
    began = time.thread_time()
    try:
        yield
        took = time.thread_time() - began
    finally:
        gc.enable()
    assert took <= seconds, f"took {took:.2f} s of processor time, expected at most {seconds}"
