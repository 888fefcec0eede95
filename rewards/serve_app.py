"""The HTTP side of a reward server: who may ask, what is taken, what is answered. No texts in any log or message."""

from __future__ import annotations

import asyncio
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

from rewards.admission import Admission, RefusalError, refuse
from rewards.batcher import Batcher, BusyError
from rewards.serve_metrics import ServeMetrics
from rewards.transport import strict_json

log = logging.getLogger(__name__)


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


class RewardService:
    """Bodies in, scores out. Encoding has a thread of its own: a tokenizer keeps state between two calls."""

    def __init__(
        self, encoder: Encoder, batcher: Batcher, metrics: ServeMetrics, *, token: str | None, limits: Limits
    ) -> None:
        self.encoder, self.batcher, self.metrics, self.limits = encoder, batcher, metrics, limits
        self.admission = Admission(token, body_bytes=limits.body_bytes, body_seconds=limits.body_seconds)
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="reward-encoding")

    async def score(self, request: Request) -> list[float | None]:
        """Raises RefusalError with the status to answer."""
        body = self._parse(await self.admission.json_body(request))
        loop = asyncio.get_running_loop()
        try:
            sequences = await loop.run_in_executor(self._encoding, self._encode, body)
        except ValueError as refusal:
            raise RefusalError(400, "template", str(refusal)) from refusal
        try:
            futures = self.batcher.submit([ids for ids in sequences if ids is not None])
        except BusyError as busy:
            raise RefusalError(503, "busy", f"{busy}, expected fewer; ask again") from busy
        found = iter(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        scores = [None if ids is None else next(found) for ids in sequences]
        if not all(score is None or math.isfinite(score) for score in scores):
            raise RefusalError(500, "not_finite", "the model gave a score that is no finite number; check its weights")
        self.metrics.responses(scores)
        return scores

    def _encode(self, body: ScoreBody) -> list[list[int] | None]:
        return [self.encoder.encode(p, r) for p, r in zip(body.prompts, body.responses, strict=True)]

    def _parse(self, data: bytes) -> ScoreBody:
        try:
            body = ScoreBody.model_validate_json(data)
            strict_json(data.decode())
        except ValidationError as fault:
            raise RefusalError(400, "bad_body", explain(fault)) from None
        except (ValueError, RecursionError):
            message = "body: expected JSON without NaN, infinity or a key twice; correct it"
            raise RefusalError(400, "bad_body", message) from None
        count, most = len(body.responses), self.limits.responses
        lengths = {"prompts": len(body.prompts), **{f"columns.{k}": len(v) for k, v in body.columns.items()}}
        for name, length in lengths.items():
            if length != count:
                message = f"{name}: got {length} for {count} responses, expected as many; align them"
                raise RefusalError(400, "bad_body", message)
        if count > most:
            message = f"responses: got {count}, expected at most {most}; send them in several requests"
            raise RefusalError(413, "too_large", message)
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
        except RefusalError as refusal:
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
        try:
            service.admission.require_token(request)
        except RefusalError as refusal:
            return refuse(refusal)
        text = service.metrics.text(unfinished=service.batcher.unfinished)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return app
