"""The bodies of OpenAI's two text endpoints, as far as a policy in training can honour them, and the answers.

What a policy is not sampled with while it trains is refused instead of ignored: nobody should read an answer for what
it is not.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MODEL = "policy"
"""The name that requests ask for."""
Count = Annotated[int, Field(ge=1)]
NEUTRAL: dict[str, tuple[float | None, ...]] = {
    "top_p": (None, 1.0),
    "top_k": (None, 0, -1),
    "presence_penalty": (None, 0.0),
    "frequency_penalty": (None, 0.0),
    "top_logprobs": (None, 0),
}
"""What clients send unasked, and the values of it that change nothing."""


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool = False


class SamplingBody(Body):
    """What both endpoints take."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    stop: str | list[str] | None = None
    n: Count = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @model_validator(mode="after")
    def _sampled_as_it_is_trained(self) -> SamplingBody:
        for name, allowed in NEUTRAL.items():
            if (value := getattr(self, name, None)) not in allowed:
                raise ValueError(
                    f"{name}: got {value}, expected {allowed[1]:g}: the policy answers as it is sampled in training, "
                    f"from the whole vocabulary; remove {name}"
                )
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ChatBody(SamplingBody):
    messages: list[dict[str, Any]]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


class CompletionBody(SamplingBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Literal[0] | None = None
    """0 gives those of the sampled tokens; there are none of others."""

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One answer, without the token that ended it."""

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """All choices of one request, from weights of one version."""

    choices: tuple[Choice, ...]
    weight_version: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def chat_answer(answer: Answer, body: ChatBody) -> dict[str, Any]:
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": choice.text},
            "finish_reason": choice.finish_reason,
            "logprobs": chat_logprobs(choice) if body.logprobs else None,
        }
        for i, choice in enumerate(answer.choices)
    ]
    return head(answer, "chatcmpl", "chat.completion") | {"choices": choices, "usage": answer.usage}


def completion_answer(answer: Answer, body: CompletionBody) -> dict[str, Any]:
    choices = [
        {
            "index": i,
            "text": choice.text,
            "finish_reason": choice.finish_reason,
            "logprobs": None if body.logprobs is None else completion_logprobs(choice),
        }
        for i, choice in enumerate(answer.choices)
    ]
    return head(answer, "cmpl", "text_completion") | {"choices": choices, "usage": answer.usage}


def head(answer: Answer, prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": MODEL,
        "system_fingerprint": f"weight_version_{answer.weight_version}",
        "weight_version": answer.weight_version,
    }


def chat_logprobs(choice: Choice) -> dict[str, Any]:
    return {
        "content": [
            {"token": token, "logprob": logprob, "bytes": None, "top_logprobs": []}
            for token, logprob in zip(choice.tokens, choice.logprobs, strict=True)
        ]
    }


def completion_logprobs(choice: Choice) -> dict[str, Any]:
    return {
        "tokens": list(choice.tokens),
        "token_logprobs": list(choice.logprobs),
        "top_logprobs": None,
        "text_offset": [len("".join(choice.tokens[:i])) for i in range(len(choice.tokens))],
    }


def events(whole: Mapping[str, Any], *, include_usage: bool) -> str:
    """A finished answer as server-sent events: per choice one with the text and one with how it ended."""
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks(whole, include_usage)) + "data: [DONE]\n\n"


def chunks(whole: Mapping[str, Any], include_usage: bool) -> Iterator[dict[str, Any]]:
    common = {name: value for name, value in whole.items() if name not in ("choices", "usage")}
    if whole["object"] == "chat.completion":
        common["object"] = "chat.completion.chunk"
    for choice in whole["choices"]:
        end = {"index": choice["index"], "finish_reason": choice["finish_reason"], "logprobs": None}
        said = {"index": choice["index"], "finish_reason": None, "logprobs": choice["logprobs"]}
        if "message" in choice:
            yield common | {"choices": [said | {"delta": choice["message"]}]}
            yield common | {"choices": [end | {"delta": {}}]}
        else:
            yield common | {"choices": [said | {"text": choice["text"]}]}
            yield common | {"choices": [end | {"text": ""}]}
    if include_usage:
        yield common | {"choices": [], "usage": whole["usage"]}


def error(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def explain(faults: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """What is wrong with a body, from pydantic's findings, and the parameter. Values stay out of it."""
    fault = faults[0]
    where = [str(part) for part in fault["loc"] if part != "body"]
    param = where[0] if where else None
    if fault["type"] == "value_error":
        return str(fault["msg"]).removeprefix("Value error, "), param
    if fault["type"] == "json_invalid":
        return "body: got text that is no JSON, expected an object; correct it", None
    if fault["type"] == "extra_forbidden":
        return f"{param}: got a parameter that is not known here, expected none of that name; remove it", param
    if fault["type"] == "missing":
        return f"{param or 'body'}: got none, expected one; add it", param
    wrong = f"{'.'.join(where) or 'body'}: got a {type(fault.get('input')).__name__} that does not fit"
    return f"{wrong}, expected: {str(fault['msg']).lower()}; correct it", param
