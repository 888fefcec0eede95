"""A real HTTP server in a thread that answers as it is told: right, wrong, late, half or not at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Planted:
    """One answer. `body`: bytes as they are, anything else as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    """What Content-Length says; None tells the truth, -1 leaves it out."""
    then: str = "close"
    """After the body: `close` the connection, or `hang` until the server stops."""
    silent: bool = False
    """No answer at all: `then` at once."""
    drip: float = 0.0
    """Seconds between two bytes of the body."""


Answer = Callable[[dict[str, Any]], Planted]


class PlantedServer:
    """`answers` is called with each request's JSON; `seen` holds path, headers and JSON of all of them."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self.stopping = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, dict(self.headers), body))
                outer._send(self, outer.answer(body))

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def _send(self, handler: BaseHTTPRequestHandler, planted: Planted) -> None:
        body = planted.body if isinstance(planted.body, bytes) else json.dumps(planted.body).encode()
        if not planted.silent:
            handler.send_response(planted.status)
            for name, value in planted.headers.items():
                handler.send_header(name, value)
            if planted.length != -1:
                handler.send_header("Content-Length", str(len(body) if planted.length is None else planted.length))
            handler.end_headers()
            try:
                for part in [body] if not planted.drip else [body[i : i + 1] for i in range(len(body))]:
                    handler.wfile.write(part)
                    handler.wfile.flush()
                    self.stopping.wait(planted.drip)
            except ConnectionError:
                return
        if planted.then == "hang":
            self.stopping.wait()


@contextmanager
def planted_server(*answers: Planted, answer: Answer | None = None) -> Iterator[PlantedServer]:
    """A server that gives these answers in order, the last one for ever, or what `answer` returns."""
    waiting = list(answers)
    lock = threading.Lock()

    def following(_: dict[str, Any]) -> Planted:
        with lock:
            return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    server = PlantedServer(answer or following)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.http.shutdown()
        thread.join()
        server.http.server_close()
