"""The HTTP side of a reward server: who may ask, what is taken, what is answered. No texts in any log or message."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from rewards.batcher import Batcher, BusyError
from rewards.serve_metrics import ServeMetrics

log = logging.getLogger(__name__)

RETRY_AFTER = 1
"""Seconds after which a client that was turned away may ask again."""
DISCARDED = 4
"""Times the longest body that is read and thrown away: a client that is cut off before cannot see the refusal."""
CLOSING = frozenset({401, 408, 413, 415})
"""Refusals that end the connection: what else would come over it is an unread body."""


class Encoder(Protocol):
    def encode(self, prompt: str, response: str) -> list[int] | None: ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may be."""

    body_bytes: int = 16 << 20
    responses: int = 1024
    body_seconds: float = 30.0
    """From its first byte to its last."""


class ScoreBody(BaseModel):
    """What a reward function is called with. Columns are taken, since others may use them, and not read."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompts: list[str]
    responses: list[str]
    columns: dict[str, list[Any]] = {}


class _RefusalError(Exception):
    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class RewardService:
    """Bodies in, scores out. Encoding has a thread of its own: a tokenizer keeps state between two calls."""

    def __init__(
        self, encoder: Encoder, batcher: Batcher, metrics: ServeMetrics, *, token: str | None, limits: Limits
    ) -> None:
        self.encoder, self.batcher, self.metrics, self.limits = encoder, batcher, metrics, limits
        self._token = None if token is None else token.encode()
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="reward-encoding")

    def allowed(self, request: Request) -> bool:
        """Whether a request carries the token. Takes as long for one that is nearly right."""
        if self._token is None:
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return hmac.compare_digest(given.strip().encode(), self._token) and scheme.lower() == "bearer"

    async def score(self, request: Request) -> list[float | None]:
        """Raises _RefusalError with the status to answer."""
        if not self.allowed(request):
            raise _RefusalError(401, "no_token", "authorization: got no valid token, expected Bearer TOKEN; send it")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # A web page can post other types here without asking first.
            raise _RefusalError(415, "content_type", "content-type: expected application/json; send that")
        body = self._parse(await self._read(request))
        loop = asyncio.get_running_loop()
        try:
            sequences = await loop.run_in_executor(self._encoding, self._encode, body)
        except ValueError as refusal:
            raise _RefusalError(400, "template", str(refusal)) from refusal
        try:
            futures = self.batcher.submit([ids for ids in sequences if ids is not None])
        except BusyError as busy:
            raise _RefusalError(503, "busy", f"{busy}, expected fewer; ask again") from busy
        found = iter(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        scores = [None if ids is None else next(found) for ids in sequences]
        if not all(score is None or math.isfinite(score) for score in scores):
            raise _RefusalError(
                500, "not_finite", "the model gave a score that is no finite number; check its weights"
            )
        self.metrics.responses(scores)
        return scores

    def _encode(self, body: ScoreBody) -> list[list[int] | None]:
        return [self.encoder.encode(p, r) for p, r in zip(body.prompts, body.responses, strict=True)]

    async def _read(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        too_large = _RefusalError(413, "too_large", f"body: expected at most {most} bytes; send fewer responses")
        size, parts = 0, bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size <= most:
                        parts += part
                    elif size > DISCARDED * most:
                        raise too_large
        except TimeoutError as slow:
            seconds = self.limits.body_seconds
            raise _RefusalError(408, "slow_body", f"body: expected all of it within {seconds:g} s") from slow
        if size > most:
            raise too_large
        return bytes(parts)

    def _parse(self, data: bytes) -> ScoreBody:
        try:
            body = ScoreBody.model_validate_json(data)
        except ValidationError as fault:
            raise _RefusalError(400, "bad_body", explain(fault)) from None
        count, most = len(body.responses), self.limits.responses
        lengths = {"prompts": len(body.prompts), **{f"columns.{k}": len(v) for k, v in body.columns.items()}}
        for name, length in lengths.items():
            if length != count:
                message = f"{name}: got {length} for {count} responses, expected as many; align them"
                raise _RefusalError(400, "bad_body", message)
        if count > most:
            message = f"responses: got {count}, expected at most {most}; send them in several requests"
            raise _RefusalError(413, "too_large", message)
        return body

    def close(self) -> None:
        """What waits is scored."""
        self._encoding.shutdown()
        self.batcher.close()


def explain(fault: ValidationError) -> str:
    """The first finding, without any value: it may be a text."""
    first = fault.errors(include_input=False, include_context=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"][:2]) if first["type"] != "extra_forbidden" else ""
    what = "valid JSON" if first["type"] == "json_invalid" else first["msg"]
    return f"{where or 'body'}: expected prompts and responses, two lists of texts ({what}); correct it"


def build_app(service: RewardService, *, host_names: Sequence[str] | None) -> FastAPI:
    """`host_names`: what a request may call this host, against web pages that point a name here; None takes any."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    if host_names is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(host_names))
    clock: Callable[[], float] = time.monotonic

    @app.post("/score")
    async def score(request: Request) -> Response:
        began, kind = clock(), None
        try:
            answer: Response = JSONResponse({"scores": await service.score(request)})
        except _RefusalError as refusal:
            kind, answer = refusal.kind, refuse(refusal)
        except ClientDisconnect:
            kind, answer = "disconnected", Response(status_code=400)
        except Exception as error:  # its text, and its traceback's, may quote a prompt
            kind = type(error).__name__
            log.error("a request failed with %s", kind)
            answer = JSONResponse({"error": f"the server failed with {kind}; see its log"}, 500)
        service.metrics.request(answer.status_code, clock() - began, kind)
        return answer

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"}) if service.batcher.alive else JSONResponse({"status": "stopped"}, 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if not service.allowed(request):
            return refuse(_RefusalError(401, "no_token", "authorization: expected Bearer TOKEN; send it"))
        text = service.metrics.text(unfinished=service.batcher.unfinished)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return app


def refuse(refusal: _RefusalError) -> Response:
    log.info("turned a request away with %d: %s", refusal.status, refusal)
    headers = {"Connection": "close"} if refusal.status in CLOSING else {}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refusal.status == 503:
        headers["Retry-After"] = str(RETRY_AFTER)
    return JSONResponse({"error": str(refusal)}, refusal.status, headers)
