"""Asks an OpenAI-compatible chat endpoint, remembers its answers on disk, and counts what they cost."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rewards.transport import BadAnswerError, JsonClient, RefusedError

log = logging.getLogger(__name__)

OWN = frozenset(
    {"model", "messages", "temperature", "max_tokens", "seed", "response_format", "n", "stream", "stream_options"}
)
"""Keys of a request's body that the client sets, or whose other values it could not read the answer of."""

Messages = Sequence[Mapping[str, str]]


@dataclass(slots=True)
class Cost:
    """What was asked so far."""

    requests: int = 0
    """Answers that the endpoint gave."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cache_hits: int = 0
    """Answers that were on disk."""
    cache_broken: int = 0
    """Files of the cache that could not be read, and were asked for anew."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: its text, and why it ended there (`stop`, `length`, ...)."""

    content: str
    finish_reason: str


class AnswerCache:
    """Replies by key in a folder that only its owner can read: they speak of prompts and responses."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).expanduser()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Reply | None:
        """Raises ValueError for a file that holds no reply."""
        try:
            text = self.path(key).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            saved = json.loads(text)
            reply = Reply(saved["content"], saved["finish_reason"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path(key)}: got no reply, expected JSON; remove it") from error
        if not isinstance(reply.content, str) or not isinstance(reply.finish_reason, str):
            raise ValueError(f"{self.path(key)}: got a reply without text, expected one; remove it")
        return reply

    def put(self, key: str, reply: Reply) -> None:
        """Whole or not at all, whoever else writes the same; mode 0600."""
        path = self.path(key)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # made with mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(reply), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


class ChatClient:
    """One model behind one endpoint. Safe to call from several threads."""

    def __init__(
        self,
        *,
        url: str,
        model: str,
        cache: str | Path | None = None,
        temperature: float = 0.0,
        max_tokens: int = 256,
        json_schema: bool | None = None,
        extra: Mapping[str, Any] | None = None,
        **connection: Any,
    ) -> None:
        """
        Args:
            url: up to and with the version, e.g. `http://127.0.0.1:8000/v1`: https, or http on this machine.
            model: the name that the endpoint knows it by.
            cache: folder of earlier replies; None asks every time. A reply is found again by model, messages and
                settings, not by the endpoint: give a model whose weights change no cache.
            temperature: of the first try; see `ask`.
            max_tokens: of a reply.
            json_schema: whether the endpoint can hold replies to a schema; None finds out.
            extra: more of the request's body, e.g. `{"chat_template_kwargs": {"enable_thinking": False}}`.
            connection: settings of `rewards.transport.JsonClient`.

        Raises:
            ValueError: a key in `extra` that is the client's own, or a setting that cannot be.
        """
        if taken := sorted(OWN & set(extra or {})):
            raise ValueError(
                f"judge: got extra with {', '.join(taken)}, expected none of {', '.join(sorted(OWN))}: the client "
                "sets what it sends of them; remove it, or use the setting of that name"
            )
        self._client = JsonClient(f"{url.rstrip('/')}/chat/completions", **connection)
        self._model, self._temperature, self._max_tokens = model, temperature, max_tokens
        self._can_constrain, self._extra = json_schema, dict(extra or {})
        self._cache = None if cache is None else AnswerCache(cache)
        self._lock = threading.Lock()
        self.cost = Cost()

    def counts(self) -> dict[str, float]:
        """Totals since the start: requests sent, retries of them, tokens told by the endpoint, replies on disk."""
        return {
            **self._client.counts,
            "prompt_token_count": self.cost.prompt_tokens,
            "completion_token_count": self.cost.completion_tokens,
            "cache_hit_count": self.cost.cache_hits,
        }

    def __repr__(self) -> str:
        return f"ChatClient({self._client.place!r}, model={self._model!r})"

    def ask(self, messages: Messages, *, schema: Mapping[str, Any], attempt: int = 0) -> Reply:
        """One reply, from the cache where it is there.

        Args:
            schema: JSON schema that the reply should follow; where the endpoint cannot see to that, nobody does.
            attempt: 0 asks at the client's temperature; later ones, each with a seed of its own, at 0.7 at least:
                a greedy model says the same again.

        Raises:
            UnavailableError, RefusedError, BadAnswerError: no reply, see `rewards.transport`.
        """
        settings = {
            "temperature": self._temperature if attempt == 0 else max(self._temperature, 0.7),
            "max_tokens": self._max_tokens,
            "seed": attempt,
            **self._extra,
        }
        key = cache_key(self._model, messages, {**settings, "schema": schema})
        if (known := self._known(key)) is not None:
            return known
        body = {"model": self._model, "messages": [dict(message) for message in messages], **settings}
        reply, usage = read_reply(self._post(body, schema), self._client.place)
        with self._lock:
            self.cost.requests += 1
            self.cost.prompt_tokens += usage[0]
            self.cost.completion_tokens += usage[1]
        if self._cache is not None:
            self._cache.put(key, reply)
        return reply

    def _known(self, key: str) -> Reply | None:
        if self._cache is None:
            return None
        try:
            reply = self._cache.get(key)
        except ValueError as broken:
            log.warning("%s", broken)
            with self._lock:
                self.cost.cache_broken += 1
            return None
        if reply is not None:
            with self._lock:
                self.cost.cache_hits += 1
        return reply

    def _post(self, body: dict[str, Any], schema: Mapping[str, Any]) -> Any:
        constrained = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}
        if self._can_constrain is not False:
            try:
                answer = self._client.post({**body, "response_format": constrained})
                self._can_constrain = True
                return answer
            except RefusedError as refusal:
                if self._can_constrain or refusal.status not in (400, 422):
                    raise
        answer = self._client.post(body)
        if self._can_constrain is None:
            log.warning("%s: no response_format there, replies are parsed as they come", self._client.place)
            self._can_constrain = False
        return answer


def cache_key(model: str, messages: Messages, settings: Mapping[str, Any]) -> str:
    """sha256 of everything that decides a reply."""
    whole = {"model": model, "messages": [dict(message) for message in messages], "settings": settings}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=dict).encode()).hexdigest()


def read_reply(answer: Any, place: str) -> tuple[Reply, tuple[int, int]]:
    """The reply in an endpoint's answer, and its prompt and completion tokens (0 where they are not told).

    A refusal to reply is an empty text.

    Raises:
        BadAnswerError: not the shape of a chat completion.
    """
    try:
        (choice,) = answer["choices"]
        content, finish_reason = choice["message"]["content"], choice.get("finish_reason")
        usage = answer.get("usage") or {}
        tokens = [usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadAnswerError(
            f"{place}: got an answer that is no chat completion with one choice ({type(error).__name__}), expected "
            "OpenAI's format; correct the URL"
        ) from None
    if not isinstance(content, str | None) or any(type(count) is not int for count in tokens):
        raise BadAnswerError(
            f"{place}: got a message or a number of tokens of another type, expected OpenAI's format; correct the URL"
        )
    return Reply(content or "", str(finish_reason)), (tokens[0], tokens[1])
