"""An HTTP endpoint for feedback: what people chose comes in while a policy learns from it.

`POST /feedback` takes an event, or `{"events": [...]}`, and answers 202 once they are on the disk: who got no answer
sends the same events again, and they count once. `GET /health` says how many there are. It listens on 127.0.0.1
unless told otherwise, and on another address with a token alone. No event is printed or logged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from alignment.feedback_log import ConflictError, FeedbackEvent, FeedbackLog, event_of
from rewards.admission import LOCAL_NAMES, Admission, RefusalError, refuse
from rewards.quiet_server import quiet_config
from rewards.serve import BACKLOG, bind
from rewards.transport import is_loopback

log = logging.getLogger(__name__)

BODY_BYTES = 1 << 20
BODY_SECONDS = 10.0
MOST_EVENTS = 1000
"""Of a request."""
MOST_CHECKED = 4
"""Requests whose events are checked at the same time: titles are tokenised, which takes a while for many."""
GRACE = 5
"""Seconds that requests under way get when the endpoint closes."""


class FeedbackEndpoint:
    """A server in a thread of this process, in front of a log."""

    def __init__(
        self,
        feedback: FeedbackLog,
        *,
        check: Callable[[FeedbackEvent], None],
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        key: str = "feedback host, port",
    ) -> None:
        """Listens when it returns.

        Args:
            check: raises ValueError for an event that no pair can be made of; from several threads.
            port: 0 takes a free one.
            token: what requests must carry.
            key: what the address is called where it was set.

        Raises:
            ValueError: an address that others reach without a token, or one that cannot be had.
        """
        if token is None and not is_loopback(host):
            raise ValueError(
                f"feedback host: got {host} without a token, expected one where others can reach it; name a token, or "
                "listen on 127.0.0.1"
            )
        self.feedback, self.check = feedback, check
        self.admission = Admission(token, body_bytes=BODY_BYTES, body_seconds=BODY_SECONDS)
        # Neither the disk nor a check of many events holds up who asks for something else.
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="feedback-writing")
        self._checking = ThreadPoolExecutor(MOST_CHECKED, thread_name_prefix="feedback-checking")
        listening = bind(host, port, key=key)
        listening.listen(BACKLOG)
        self.port: int = listening.getsockname()[1]
        app = build_app(self, alone=token is None)
        self._server = uvicorn.Server(quiet_config(app, grace=GRACE, log_level="critical"))
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listening]}, name="feedback-endpoint", daemon=True
        )
        self._thread.start()

    async def accept(self, request: Request) -> dict[str, int]:
        """Log the events of a request: all, or none where one is refused.

        Raises:
            RefusalError: the status to answer.
        """
        body, loop = await self.admission.json_body(request), asyncio.get_running_loop()
        events = await loop.run_in_executor(self._checking, self._parse, body)
        try:
            new = await loop.run_in_executor(self._writing, self.feedback.append, events)
        except ConflictError as conflict:
            raise RefusalError(409, "conflict", str(conflict)) from conflict
        except OSError as trouble:
            raise RefusalError(
                503,
                "disk",
                f"the log took nothing ({trouble.strerror}), expected its file on a disk with room; send it again",
            ) from trouble
        return {"new": new, "known": len(events) - new}

    def _parse(self, data: bytes) -> list[FeedbackEvent]:
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RefusalError(400, "bad_body", "body: got no JSON, expected an event; correct it") from error
        several = isinstance(body, dict) and set(body) == {"events"} and isinstance(body["events"], list)
        rows: list[Any] = body["events"] if several else [body]
        if not rows:
            raise RefusalError(400, "bad_body", f"events: got none, expected 1 to {MOST_EVENTS}; send at least one")
        if len(rows) > MOST_EVENTS:
            message = f"events: got {len(rows)}, expected 1 to {MOST_EVENTS}; send them in several requests"
            raise RefusalError(413, "too_large", message)
        events = []
        for number, row in enumerate(rows):
            try:
                event = event_of(row)
                if not self.feedback.has(event):
                    self.check(event)
            except ValueError as refusal:
                where = f"events[{number}]: " if several else ""
                raise RefusalError(400, "bad_event", f"{where}{refusal}") from refusal
            events.append(event)
        return events

    def close(self) -> None:
        """Requests under way are answered; then the port is free. The log stays open."""
        self._server.should_exit = True
        self._thread.join()
        self._checking.shutdown()
        self._writing.shutdown()


def build_app(endpoint: FeedbackEndpoint, *, alone: bool) -> FastAPI:
    """`alone`: requests carry no token, so they must name this host."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    if alone:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL_NAMES))

    @app.post("/feedback")
    async def feedback(request: Request) -> Response:
        try:
            return JSONResponse(await endpoint.accept(request), 202)
        except RefusalError as refusal:
            return refuse(refusal)
        except ClientDisconnect:
            return Response(status_code=400)
        except Exception as error:  # its text, and its traceback's, may quote an event
            log.error("a request failed with %s", type(error).__name__)
            return JSONResponse({"error": f"the endpoint failed with {type(error).__name__}; see its log"}, 500)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "events": len(endpoint.feedback)})

    return app
