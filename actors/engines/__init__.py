"""Rollout engines: transformers embedded, or vLLM. Nothing here imports vLLM before an engine is built."""

from actors.engines.base import EngineKind, RolloutEngine, SamplingSettings, choose_engine

__all__ = ["EngineKind", "RolloutEngine", "SamplingSettings", "choose_engine"]
