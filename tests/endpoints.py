"""A rollout actor that serves an endpoint, in this process, and a client of it."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.handles import PolicyHandle
from actors.local import LocalGroup
from actors.policy import PolicyActor
from actors.rollout import RolloutActor
from alignment.config import ModelConfig, PolicyConfig, PpoConfig, RolloutConfig
from alignment.data.prompts import make_prompt

MESSAGES = [{"role": "user", "content": "What helps against hay fever?"}]
TIMEOUT = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rollout_actor(tiny: Path, port: int | None, **changes) -> RolloutActor:
    path = str(tiny / "policy")
    return RolloutActor(
        model_path=path,
        model=ModelConfig(path=path),
        rollout=RolloutConfig(engine="transformers", max_new_tokens=12, endpoint_port=port, **changes),
        seed=1,
    )


@dataclass
class Serving:
    """A rollout actor that serves, the policy that it follows, and a client."""

    group: LocalGroup
    policy: PolicyHandle
    port: int
    version: int = 0

    @property
    def actor(self) -> RolloutActor:
        return self.group.host.actors["rollout"]

    def ask(self, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
        code, text = self.raw(path, body, **headers)
        return code, json.loads(text)

    def raw(self, path: str, body: object = None, **headers: str) -> tuple[int, str]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read().decode()

    def chat(self, **changes) -> tuple[int, dict]:
        body = {"model": "policy", "messages": MESSAGES, "temperature": 0} | changes
        return self.ask("/v1/chat/completions", body)

    def complete(self, **changes) -> tuple[int, dict]:
        return self.ask("/v1/completions", {"model": "policy", "prompt": "Once", "temperature": 0} | changes)

    def rollouts(self, **changes):
        """What the run itself samples."""
        return self.actor.generate([make_prompt(self.actor.tokenizer, MESSAGES)], step=0, **changes)

    def greedy(self) -> str:
        return self.rollouts(greedy=True)[0].response

    def change_policy(self) -> None:
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for parameter in self.policy.group.host.actors["policy"].model.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        self.version += 1


@contextmanager
def serving_actor(tiny: Path) -> Iterator[Serving]:
    """`tiny`: the folder that the fixture of this name makes."""
    path = str(tiny / "policy")
    policy = PolicyActor(
        model_path=path,
        model=ModelConfig(path=path),
        policy=PolicyConfig(),
        ppo=PpoConfig(),
        temperature=1.0,
        total_updates=1,
        seed=1,
    )
    port = free_port()
    groups = LocalGroup({"policy": policy}), LocalGroup({"rollout": rollout_actor(tiny, port)})
    for group in groups:
        group.start().result()
    try:
        yield Serving(groups[1], PolicyHandle(groups[0]), port)
    finally:
        groups[1].stop()


def text(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]
