"""Fixtures that several test folders share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tiny import write_prompts, write_tiny_model, write_tiny_reward_model

# A shell starts background jobs with Ctrl-C ignored, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with `policy`, `reward`, `prompts.jsonl`."""
    root = tmp_path_factory.mktemp("tiny")
    write_tiny_model(root / "policy")
    write_tiny_reward_model(root / "reward")
    write_prompts(root / "prompts.jsonl")
    return root


@pytest.fixture(scope="session", params=["llama", "qwen2", "mistral", "gpt2"])
def any_model_folder(request, tmp_path_factory) -> Path:
    """The same tiny size in the shapes of four families."""
    return write_tiny_model(tmp_path_factory.mktemp(request.param) / "model", request.param)
