"""What our HTTP servers have in common: the packages they need, and that they tell nothing of requests."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import uvicorn


MAX_CONNECTIONS = 1024
"""At a time: where so many are open, a request is answered 503."""


def missing_packages() -> list[str]:
    """Those of the extra `serve` that are not installed."""
    return [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]


def quiet_config(
    app: Any, *, grace: int, log_level: str, certificate: str | None = None, key: str | None = None
) -> uvicorn.Config:
    """A server without logs of requests, start-up hooks, websockets, or a header that names it.

    Args:
        grace: seconds that requests under way get when it stops.
        log_level: from which uvicorn's own messages are logged.
        certificate, key: files in PEM format, for https.
    """
    import uvicorn

    return uvicorn.Config(
        app,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=log_level,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=grace,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
