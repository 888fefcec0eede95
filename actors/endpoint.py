"""An OpenAI-compatible endpoint on a rollout engine: talk to the policy while it trains.

It listens on 127.0.0.1 alone, without a password: for the people on this machine, and for those with a tunnel to it.
Requests take turns with the run and are answered one after the other. Prompts and answers are neither printed nor
logged.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from actors import openai_format
from actors.engines import RolloutEngine, SamplingSettings
from actors.listening import HOST, listen
from actors.openai_format import Answer, ChatBody, Choice, CompletionBody, SamplingBody
from actors.turns import NotReadyError, Turns
from alignment.data.chat import decode, encode_prompt, single_token
from alignment.generation import Sample, sampling_seed
from rewards.quiet_server import quiet_config

log = logging.getLogger(__name__)

HOST_NAMES = [HOST, "localhost"]
"""What a request may call this host: a web page that points a name of its own here is turned away."""
PATIENCE = 120.0
"""Seconds that a request waits for the run to leave the engine alone, with complete weights."""
GRACE = 5
"""Seconds that requests under way get when the actor stops."""
SHORTEST_LIMIT = 256
"""Tokens that a request may ask for even where the run's own answers are shorter."""
TEMPERATURES = (0.01, 100.0)
"""Beyond them vLLM samples at another temperature than it was asked for, or fails."""


class Speaker:
    """Answers requests with the engine's current weights."""

    def __init__(
        self,
        engine: RolloutEngine,
        turns: Turns,
        tokenizer: Any,
        *,
        stop_ids: frozenset[int],
        max_new_tokens: int,
        temperature: float,
        max_batch: int,
    ) -> None:
        """`max_new_tokens` and `temperature` are the run's: what a request that names none is answered with."""
        self.engine, self.turns, self.tokenizer, self.stop_ids = engine, turns, tokenizer, stop_ids
        self.max_new_tokens, self.temperature, self.max_batch = max_new_tokens, temperature, max_batch

    def chat(self, body: ChatBody, deadline: float) -> dict[str, Any]:
        if not body.messages:
            raise ValueError("messages: got an empty list, expected at least one message; add one")
        prompt = encode_prompt(self.tokenizer, body.messages)
        answer = self.answer([prompt], body, body.max_completion_tokens or body.max_tokens, deadline)
        return openai_format.chat_answer(answer, body)

    def complete(self, body: CompletionBody, deadline: float) -> dict[str, Any]:
        """The prompt is taken as it is, control tokens that it spells out included: no chat template."""
        prompts = [p if isinstance(p, list) else self.tokenizer(p)["input_ids"] for p in body.prompts]
        return openai_format.completion_answer(self.answer(prompts, body, body.max_tokens, deadline), body)

    def answer(
        self, prompts: Sequence[list[int]], body: SamplingBody, max_tokens: int | None, deadline: float
    ) -> Answer:
        """Choices in prompt order, `n` of each. `deadline`: in seconds of `time.monotonic`, to have begun.

        Raises:
            ValueError: something that the engine cannot do.
            NotReadyError: no complete weights in time.
        """
        limit = max_tokens or self.max_new_tokens
        self._check(prompts, body.n, limit)
        stops = frozenset(single_token(self.tokenizer, stop, what="stop") for stop in body.stops)
        temperature = self.temperature if body.temperature is None else body.temperature
        if temperature and not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
            raise ValueError(
                f"temperature: got {temperature:g}, expected 0 (greedy) or {TEMPERATURES[0]:g} to "
                f"{TEMPERATURES[1]:g}; correct it"
            )
        settings = SamplingSettings(
            max_new_tokens=limit,
            temperature=temperature or 1.0,
            stop_ids=self.stop_ids | stops,
            greedy=temperature == 0,
        )
        seed = secrets.randbits(48) if body.seed is None else body.seed
        rows = [(i, j) for i in range(len(prompts)) for j in range(body.n)]
        with self.turns.request(timeout=max(0.0, deadline - time.monotonic())):
            version = self._version()
            samples = self.engine.generate(
                [prompts[i] for i, _ in rows],
                [sampling_seed(seed, "request", i, j) for i, j in rows],
                [settings] * len(rows),
            )
        return Answer(
            choices=tuple(self._choice(sample, stops) for sample in samples),
            weight_version=version,
            prompt_tokens=sum(map(len, prompts)),
            completion_tokens=sum(len(sample.response_ids) for sample in samples),
        )

    def _version(self) -> int:
        try:
            return self.engine.weight_version
        except RuntimeError as torn:
            raise NotReadyError(str(torn)) from torn

    def _check(self, prompts: Sequence[Sequence[int]], n: int, limit: int) -> None:
        if not prompts or not all(prompts):
            raise ValueError("prompt: got none, or one without tokens, expected at least one token; add some text")
        if len(prompts) * n > self.max_batch:
            raise ValueError(
                f"n: got {len(prompts) * n} answers to give, expected at most {self.max_batch}; lower n, or ask twice"
            )
        most = max(self.max_new_tokens, SHORTEST_LIMIT)
        if limit > most:
            raise ValueError(
                f"max_tokens: got {limit}, expected at most {most}: the run waits for an answer that has begun; "
                "lower it"
            )
        highest, lowest = max(map(max, prompts)), min(map(min, prompts))
        if lowest < 0 or highest >= len(self.tokenizer):
            raise ValueError(
                f"prompt: got token ids from {lowest} to {highest}, expected 0 to {len(self.tokenizer) - 1}; "
                "use the policy's tokenizer"
            )
        longest, room = max(map(len, prompts)), self.engine.max_model_len
        if room is not None and longest + limit > room:
            raise ValueError(
                f"max_tokens: got a prompt of {longest} tokens and max_tokens={limit}, expected at most {room} "
                "together; shorten the prompt, or lower max_tokens"
            )

    def _choice(self, sample: Sample, stops: frozenset[int]) -> Choice:
        """The text is the run's own decoding of the answer, without a stop token that the request named."""
        said = len(sample.response_ids) - (sample.finish_reason == "stop")
        shown = sample.response_ids[:said] if sample.response_ids[-1] in stops else sample.response_ids
        return Choice(
            text=decode(self.tokenizer, shown),
            tokens=tuple(str(self.tokenizer.decode([token])) for token in sample.response_ids[:said]),
            logprobs=sample.rollout_logprobs[:said],
            finish_reason=sample.finish_reason,
        )


class Endpoint:
    """A server in a thread of this process."""

    def __init__(self, port: int, speaker: Speaker) -> None:
        """Listens when it returns.

        Raises:
            ValueError: the port is taken.
        """
        self._speaker = speaker
        listening = listen(port)
        self._computing = Computing()
        app = build_app(speaker, self._computing)
        self._server = uvicorn.Server(quiet_config(app, grace=GRACE, log_level="critical"))
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listening]}, name="endpoint", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Requests under way are answered, those that wait are not; then the port is free."""
        self._speaker.turns.close()
        self._server.should_exit = True
        self._computing.close()
        self._thread.join()


class Computing:
    """One daemon thread that runs the engine for requests: what it is at when the process ends is dropped.

    Every thread that computes has a pool of helpers of its own, so all requests share one.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="endpoint-engine", daemon=True).start()

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """A job whose future is cancelled before its turn is never begun."""
        future: Future[Any] = Future()
        self._jobs.put((future, job))
        return future

    def close(self) -> None:
        """Take no job after those that wait, which are turned away by the engine's `Turns`."""
        self._jobs.put(None)

    def _run(self) -> None:
        # Asking for the number of threads sets it; without that OpenMP starts this one with another number, which
        # vLLM's kernels refuse.
        torch.get_num_threads()
        while (entry := self._jobs.get()) is not None:
            future, job = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as error:  # whoever waits for the answer raises it
                future.set_exception(error)


def build_app(speaker: Speaker, computing: Computing) -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOST_NAMES)

    async def respond(answer: Callable[[Any, float], dict[str, Any]], body: Any) -> Response:
        deadline = time.monotonic() + PATIENCE
        if body.model != openai_format.MODEL:
            message = f"model: got {body.model!r}, expected {openai_format.MODEL!r}; ask for that one"
            return JSONResponse(openai_format.error(message, param="model", code="model_not_found"), 404)
        try:
            whole = await asyncio.wrap_future(computing.submit(lambda: answer(body, deadline)))
        except ValueError as refusal:
            return JSONResponse(openai_format.error(str(refusal)), 400)
        except NotReadyError as delay:
            message = f"{delay}; ask again"
            return JSONResponse(openai_format.error(message, kind="server_error", code="not_ready"), 503)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return Response(openai_format.events(whole, include_usage=usage), media_type="text/event-stream")
        return JSONResponse(whole)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": openai_format.MODEL, "object": "model", "owned_by": "raylign"}]}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody) -> Any:
        return await respond(speaker.chat, body)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody) -> Any:
        return await respond(speaker.complete, body)

    app.add_exception_handler(RequestValidationError, refuse_body)
    app.add_exception_handler(HTTPException, refuse_path)
    app.add_exception_handler(404, refuse_path)
    app.add_exception_handler(405, refuse_path)
    app.add_exception_handler(Exception, fail)
    return app


async def refuse_body(_: Any, fault: Any) -> Response:
    message, param = openai_format.explain(fault.errors())
    return JSONResponse(openai_format.error(message, param=param), 400)


async def refuse_path(request: Any, fault: Any) -> Response:
    message = (
        f"got {request.method} {request.url.path} ({fault.detail}), expected GET /v1/models, "
        "POST /v1/chat/completions or POST /v1/completions; correct it"
    )
    return JSONResponse(openai_format.error(message), fault.status_code)


async def fail(_: Any, fault: Exception) -> Response:
    """The kind of failure alone: its text may quote a prompt."""
    log.error("endpoint: a request failed with %s", type(fault).__name__)
    message = f"the engine failed with {type(fault).__name__}; the run's own error says more"
    return JSONResponse(openai_format.error(message, kind="server_error"), 500)
