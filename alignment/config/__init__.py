"""Typed configs of every stage: frozen, nested by owner, unknown keys refused. Importable without torch.

A config is a fact: building one has no side effect. Builders unpack it into plain arguments; no function of
the maths ever sees one. `alignment.config_io` reads YAML and dotted overrides into these classes.
"""

from __future__ import annotations

from alignment.config.base import Config
from alignment.config.cluster import ROLES, ClusterConfig, RoleConfig, RolloutRoleConfig
from alignment.config.data import PreferenceDataConfig, PromptDataConfig, SftDataConfig, SftSourceConfig, SourceConfig
from alignment.config.hacking import HackingConfig
from alignment.config.iterative import IterativeRunConfig, RoundsConfig
from alignment.config.model import AdapterConfig, MicroBatchConfig, ModelConfig, OptimizerConfig
from alignment.config.ppo import CriticConfig, KlConfig, PolicyConfig, PpoConfig, PpoRunConfig
from alignment.config.preference import (
    DpoConfig,
    DpoRunConfig,
    KtoConfig,
    KtoRunConfig,
    PreferenceStepsConfig,
    PreferenceTrainingConfig,
)
from alignment.config.ranking import PairingConfig, RankedRunConfig, RankingConfig, RankRunConfig
from alignment.config.recommender import FilmsConfig, LiveRunConfig, LiveTrainingConfig, RecommenderRunConfig
from alignment.config.reward import GoldFunctionConfig, RewardConfig, RewardExecutionConfig, RewardFunctionConfig
from alignment.config.reward_model import RewardDataConfig, RewardModelRunConfig, RewardModelTrainingConfig
from alignment.config.rollout import CorrectionConfig, RolloutConfig, VllmConfig
from alignment.config.run import EvaluationConfig, RunConfig
from alignment.config.sft import SftRunConfig, SftTrainingConfig

__all__ = [
    "ROLES",
    "AdapterConfig",
    "ClusterConfig",
    "Config",
    "CorrectionConfig",
    "CriticConfig",
    "DpoConfig",
    "DpoRunConfig",
    "EvaluationConfig",
    "FilmsConfig",
    "GoldFunctionConfig",
    "HackingConfig",
    "IterativeRunConfig",
    "KlConfig",
    "KtoConfig",
    "KtoRunConfig",
    "LiveRunConfig",
    "LiveTrainingConfig",
    "MicroBatchConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PairingConfig",
    "PolicyConfig",
    "PpoConfig",
    "PpoRunConfig",
    "PreferenceDataConfig",
    "PreferenceStepsConfig",
    "PreferenceTrainingConfig",
    "PromptDataConfig",
    "RankRunConfig",
    "RankedRunConfig",
    "RankingConfig",
    "RecommenderRunConfig",
    "RewardConfig",
    "RewardDataConfig",
    "RewardExecutionConfig",
    "RewardFunctionConfig",
    "RewardModelRunConfig",
    "RewardModelTrainingConfig",
    "RoleConfig",
    "RolloutConfig",
    "RolloutRoleConfig",
    "RoundsConfig",
    "RunConfig",
    "SftDataConfig",
    "SftRunConfig",
    "SftSourceConfig",
    "SftTrainingConfig",
    "SourceConfig",
    "VllmConfig",
]
