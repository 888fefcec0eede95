"""The port of a rollout actor's endpoint: what can be told before there is one, and the socket itself."""

from __future__ import annotations

import errno
import socket

from rewards.quiet_server import missing_packages

HOST = "127.0.0.1"


def check_endpoint(port: int) -> None:
    """Refuse an endpoint that could not be opened here.

    Raises:
        ValueError: the extra `serve` is not installed, or the port is taken.
    """
    require_server(port)
    listen(port).close()


def require_server(port: int) -> None:
    """Refuse an endpoint without the packages that serve it, the extra `serve`."""
    if missing := missing_packages():
        raise ValueError(
            f"rollout.endpoint_port: got {port} without {' and '.join(missing)}, expected it to be installed; run "
            'pip install -e ".[serve]", or remove the port'
        )


def listen(port: int) -> socket.socket:
    """A socket on the loopback interface alone."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        # From here on the kernel queues who connects, until the server's loop takes over.
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ValueError(
            f"rollout.endpoint_port: got {port} ({error.strerror}), expected a free port of 127.0.0.1; choose another "
            "one, or stop what uses it"
        ) from error
    return listening
