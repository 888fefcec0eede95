"""What our HTTP servers let in: who carries the token, and bodies of JSON that are neither too long nor too slow.

Needs the packages of the extra `serve`. No message quotes a request.
"""

from __future__ import annotations

import asyncio
import hmac
import logging

from fastapi import Request
from fastapi.responses import JSONResponse, Response

log = logging.getLogger(__name__)

LOCAL_NAMES = ("127.0.0.1", "localhost", "::1", "[::1]")
"""What a request may call a host that asks for no token, against web pages that point a name of their own here."""
RETRY_AFTER = 1
"""Seconds after which a client that was turned away may ask again."""
DISCARDED = 4
"""Times the longest body that is read and thrown away: a client that is cut off before cannot see the refusal."""
CLOSING = frozenset({401, 408, 413, 415})
"""Refusals that end the connection: what else would come over it is an unread body."""


class RefusalError(Exception):
    """A request that is answered with a status and a reason."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Admission:
    """Checks a request before anything of it is used."""

    def __init__(self, token: str | None, *, body_bytes: int, body_seconds: float) -> None:
        """
        Args:
            token: what a request must carry; None lets everybody in.
            body_bytes: of a request, at most.
            body_seconds: from its first byte to its last.
        """
        self._token = None if token is None else token.encode()
        self.body_bytes, self.body_seconds = body_bytes, body_seconds

    def require_token(self, request: Request) -> None:
        """Takes as long for a token that is nearly right.

        Raises:
            RefusalError: another one, or none.
        """
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if not (hmac.compare_digest(given.strip().encode(), self._token) and scheme.lower() == "bearer"):
            raise RefusalError(401, "no_token", "authorization: got no valid token, expected Bearer TOKEN; send it")

    async def json_body(self, request: Request) -> bytes:
        """The whole body of a request that may ask.

        Raises:
            RefusalError: no token, another content type, or a body that is too long or too slow.
        """
        self.require_token(request)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # A web page can post other types here without asking first.
            raise RefusalError(415, "content_type", "content-type: expected application/json; send that")
        most = self.body_bytes
        too_large = RefusalError(413, "too_large", f"body: expected at most {most} bytes; send less at a time")
        size, parts = 0, bytearray()
        try:
            async with asyncio.timeout(self.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size <= most:
                        parts += part
                    elif size > DISCARDED * most:
                        raise too_large
        except TimeoutError as slow:
            raise RefusalError(
                408, "slow_body", f"body: expected all of it within {self.body_seconds:g} s; send it faster"
            ) from slow
        if size > most:
            raise too_large
        return bytes(parts)


def refuse(refusal: RefusalError) -> Response:
    """The answer to a request that is turned away."""
    log.info("turned a request away with %d: %s", refusal.status, refusal)
    headers = {"Connection": "close"} if refusal.status in CLOSING else {}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refusal.status == 503:
        headers["Retry-After"] = str(RETRY_AFTER)
    return JSONResponse({"error": str(refusal)}, refusal.status, headers)
