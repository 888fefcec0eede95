"""What reward functions that ask a server share: settings of the connection, its time, the count of requests."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from typing import Any

from rewards.base import with_defaults


def connection(*, token_file: str, ca_file: str, **settings: Any) -> dict[str, Any]:
    """Settings of a config as those of `rewards.transport.JsonClient`, where an empty text is none.

    The token is in a file alone: every process of a run inherits its environment.
    """
    # Workers that are turned away together do not come back together.
    return {"token_file": token_file or None, "ca_file": ca_file or None, "seed": os.getpid(), **settings}


def trust(ca_file: str | None) -> ssl.SSLContext:
    """Whose certificates are taken: those of a file, or the system's. Raises ValueError for a file without any."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ValueError(
            f"remote.ca_file: got {ca_file!r} ({type(error).__name__}), expected a file of certificates in PEM "
            "format; correct the path, or the file"
        ) from error


def settings_of(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the values of a function's parameters, those that are settings."""
    return {name: values[name] for name in with_defaults(function, {})}


def longest_post(*, timeout: float, retries: int, max_wait: float) -> float:
    """Seconds that one request takes at most, with its retries and the waits before them."""
    return (retries + 1) * timeout + retries * max_wait


class Growth:
    """What totals grew by since it was asked last."""

    def __init__(self) -> None:
        self._told: Mapping[str, float] = {}

    def __call__(self, totals: Mapping[str, float]) -> dict[str, float]:
        grown = {name: total - self._told.get(name, 0) for name, total in totals.items()}
        self._told = dict(totals)
        return grown
