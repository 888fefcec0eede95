"""Runs that recommend films: from pairs that are there, and from choices while they arrive."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from alignment.config.base import Config, Positive
from alignment.config.model import (
    AdapterConfig,
    MicroBatchConfig,
    ModelConfig,
    OptimizerConfig,
    refuse_adapter_for_model,
    refuse_adaptive_rate,
    refuse_float16_training,
    refuse_small_budget,
)
from alignment.config.preference import DpoConfig, DpoRunConfig, ReferenceConfig
from alignment.config.run import RunConfig

LATE_ASSETS = {"movielens-pairs": "movielens-early-pairs", "movielens-histories": "movielens-early-histories"}
"""Assets that tell of what an early table keeps for its tests, and those that do not."""
PACKAGED_TEST = 10_000
"""Ratings at the end of the packaged table of which no asset's pairs tell."""


class FilmsConfig(Config):
    """Who liked which film when, and who is asked about it; docs/recommender.md."""

    folder: Annotated[str, Field(min_length=1)] | None = None
    """Folder with tables `ml-100k.inter` and `ml-100k.item`; None is the packaged MovieLens-100K."""
    num_test: Positive = PACKAGED_TEST
    """Ratings at the end of the table that are for tests; of the packaged one always so many."""
    early: bool = False
    """Leave those out, so that the last ones before them are for tests, and ask people about what they liked after
    their last choice: for a policy that learns from these choices, and for the one that it begins with."""
    choices_per_person: Positive = 5
    """With early: how many likes of a person, at most, are choices; later ones are asked about."""
    num_people: Positive | None = None
    """How many are asked, chosen by a hash; None asks everybody who can be."""
    num_negatives: Positive = 99
    """Films beside the right one, drawn from all, and as many again by popularity."""
    row_tokens: Positive = 320
    """Tokens of a forward that scores titles. In bfloat16 a score moves with it."""

    @model_validator(mode="after")
    def _pairs_end_where_tests_begin(self) -> FilmsConfig:
        if self.folder is None and self.num_test != PACKAGED_TEST:
            raise ValueError(
                f"films.num_test: got {self.num_test} of the packaged table, expected {PACKAGED_TEST}, before which "
                "its pairs end; remove it, or name a films.folder with pairs of your own"
            )
        return self


class RecommenderRunConfig(DpoRunConfig):
    """DPO on pairs of titles, and what it makes of a ranking of films."""

    base: str | None = None
    """What `model` was made from: "before" and implicit rewards are of this one. None is the model itself."""
    films: FilmsConfig = FilmsConfig()
    """What is ranked."""

    @model_validator(mode="after")
    def _pairs_are_of_the_table(self) -> RecommenderRunConfig:
        packaged = [task.asset for task in self.data.sources if task.asset in {*LATE_ASSETS, *LATE_ASSETS.values()}]
        if self.films.folder is not None and packaged:
            raise ValueError(
                f"data.sources: got asset {packaged[0]} with films.folder, expected pairs of that folder's table: "
                "those of the packaged one may tell of its tests; name a file, or remove films.folder"
            )
        return self

    @model_validator(mode="after")
    def _pairs_tell_nothing_of_the_tests(self) -> RecommenderRunConfig:
        late = [task.asset for task in self.data.sources if task.asset in LATE_ASSETS]
        if self.films.early and late:
            raise ValueError(
                f"data.sources: got asset {late[0]} with films.early, expected {LATE_ASSETS[late[0]]}: the first "
                "tells of films that people are asked about; change the asset, or set films.early to false"
            )
        return self

    @model_validator(mode="after")
    def _rewards_are_measured_from_what_stays(self) -> RecommenderRunConfig:
        if self.reference.sync_every is not None and self.base is None:
            raise ValueError(
                f"reference.sync_every: got {self.reference.sync_every} without base, expected none: films are ranked "
                "by how far the policy is from the model that the run began with; remove it, or name the base"
            )
        return self


class FeedbackDataConfig(Config):
    """How choices become pairs."""

    system_prompt: str | None = None
    """As in the run that trained the model."""
    max_tokens: Positive = 128
    """A choice with a prompt and title beyond that is refused."""


class LiveTrainingConfig(MicroBatchConfig):
    """The steps."""

    adapter: AdapterConfig = AdapterConfig(r=16)
    """What is trained. With its adapter off the policy is the reference."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, warmup_ratio=0.0, decay="constant")
    """Its optimiser; the rate stays as it is, since nobody knows how many choices will come."""
    choices_per_step: Positive = 4
    """A step waits for so many."""
    pairs_per_choice: Annotated[int, Field(gt=0, lt=100)] = 3
    """The chosen title against so many of those shown beside it, at most; drawn by the choice's id."""

    @property
    def batch_size(self) -> int:
        """Pairs of a step, at most."""
        return self.choices_per_step * self.pairs_per_choice

    @model_validator(mode="after")
    def _rate_stays(self) -> LiveTrainingConfig:
        refuse_adaptive_rate(self.optimizer, "training.optimizer")
        if self.optimizer.decay != "constant" or self.optimizer.warmup_ratio:
            raise ValueError(
                f"training.optimizer: got decay={self.optimizer.decay}, warmup_ratio={self.optimizer.warmup_ratio:g}, "
                "expected constant and 0: a run whose end nobody knows has no shares; set both"
            )
        return self


class FeedbackConfig(Config):
    """Where choices come from: one source at least."""

    replay: bool = False
    """Feed the choices of the table's people, as an application would; alone, the run ends when they are learnt."""
    port: Annotated[int, Field(ge=0, lt=2**16)] | None = None
    """Take choices by HTTP on this port of 127.0.0.1; 0 takes a free one."""
    file: Annotated[str, Field(min_length=1)] | None = None
    """Follow a file to which an application appends choices, a JSON object a line."""
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 0.5
    """How often to look for new ones."""

    @model_validator(mode="after")
    def _something_comes(self) -> FeedbackConfig:
        if not self.replay and self.port is None and self.file is None:
            raise ValueError("live: got no source of choices, expected replay, port or file; set one of them")
        return self


class LiveRunConfig(Config):
    """Everything of a run on choices but the machines."""

    reference: ClassVar[ReferenceConfig] = ReferenceConfig()
    """Asked at every step: what will be asked is not known before."""

    run: RunConfig = RunConfig()
    """The run itself; num_steps ends it where SIGTERM, or the end of a replay, does not."""
    model: ModelConfig = ModelConfig(path="runs/dpo_recommender_early/final")
    """What goes on learning; the run that makes it comes first where it is not there yet."""
    base: str = "asset:smollm2-135m-instruct"
    """What `model` was made from: implicit rewards are measured from here."""
    data: FeedbackDataConfig = FeedbackDataConfig()
    """How choices become pairs."""
    dpo: DpoConfig = DpoConfig()
    """The loss."""
    training: LiveTrainingConfig = LiveTrainingConfig()
    """The steps."""
    films: FilmsConfig = FilmsConfig(early=True)
    """What choices are about, and what is ranked before and after."""
    live: FeedbackConfig = FeedbackConfig(replay=True)
    """Where choices come from."""

    @model_validator(mode="after")
    def _tests_are_not_learnt_from(self) -> LiveRunConfig:
        if not self.films.early:
            raise ValueError(
                "films.early: got false in a run that learns from choices, expected true: else choices are ratings "
                "of the table's test part; set it to true"
            )
        return self

    @model_validator(mode="after")
    def _model_can_be_trained(self) -> LiveRunConfig:
        refuse_float16_training(self.model)
        refuse_adapter_for_model(self.model, self.training.adapter, "training")
        longest = 2 * self.data.max_tokens
        refuse_small_budget(self.training, "training", longest, f"the longest pair, 2 x {self.data.max_tokens}")
        if not self.dpo.uses_reference:
            raise ValueError(
                f"dpo.terms: got {[term.kind for term in self.dpo.terms]}, expected one that compares with the "
                "reference: it alone ties small steps to what was learnt before; add sigmoid"
            )
        return self
