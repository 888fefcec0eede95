"""What the config classes accept and refuse on their own."""

import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from alignment.config import (
    ClusterConfig,
    Config,
    GoldFunctionConfig,
    HackingConfig,
    KlConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    PpoConfig,
    PpoRunConfig,
    RewardConfig,
    RewardFunctionConfig,
    RewardModelRunConfig,
    RolloutConfig,
    RunConfig,
    SourceConfig,
)
from alignment.config_io import load_config
from alignment.kl import AdaptiveKLController

REWARD = RewardConfig(functions=(RewardFunctionConfig(name="text:finished_sentence"),))


def classes(base: type[Config] = Config) -> list[type[Config]]:
    return [found for cls in base.__subclasses__() for found in (cls, *classes(cls))]


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_field_is_documented(cls):
    undocumented = [name for name, field in cls.model_fields.items() if not (field.description or "").strip()]
    assert not undocumented


@pytest.mark.parametrize("cls", [PpoRunConfig, RewardModelRunConfig, ClusterConfig, PpoConfig])
def test_unknown_keys_are_refused(cls):
    with pytest.raises(ValidationError, match="extra_forbidden"):
        cls.model_validate({"no_such_key": 1})


def test_configs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        PpoConfig().gamma = 0.5


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (PpoConfig, {"clip_ratio": 1.0}),
        (PpoConfig, {"clip_ratio": 0.0}),
        (PpoConfig, {"gamma": 1.01}),
        (PpoConfig, {"gae_lambda": float("nan")}),
        (PpoConfig, {"ppo_epochs": 0}),
        (PpoConfig, {"dual_clip": 1.0}),
        (OptimizerConfig, {"lr": float("nan")}),
        (OptimizerConfig, {"lr": float("inf")}),
        (OptimizerConfig, {"lr": 0.0}),
        (OptimizerConfig, {"betas": (0.9,)}),
        (OptimizerConfig, {"betas": (0.9, 1.0)}),
        (OptimizerConfig, {"adaptive_bounds": (4.0, 0.1)}),
        (RunConfig, {"seed": -1}),
        (RunConfig, {"seed": 2**63}),
        (RewardFunctionConfig, {"name": "text:no_refusal", "weight": float("nan")}),
        (RewardConfig, {"model": "m", "model_weight": float("inf")}),
        (RewardConfig, {"functions": REWARD.functions * 2}),
        (RolloutConfig, {"temperature": 0.0}),
        (RewardFunctionConfig, {"name": "text:no_refusal", "clip": [1.0, 1.0]}),
        (RewardFunctionConfig, {"name": "text:no_refusal", "time_limit": 0.0}),
        (RewardConfig, {"functions": [{"name": "a:b"}, {"name": "c:d", "part": "a:b"}]}),
        (RewardConfig, {"functions": [{"name": "a:b", "part": "reward_model"}]}),
        (RewardConfig, {"model": "m", "execution": {"num_workers": 0}}),
        (RewardConfig, {"model": "m", "max_unscorable": 1.5}),
        (RewardConfig, {"functions": [{"name": "a:b", "part": "gold/b"}]}),
        (RewardConfig, {"model": "m", "gold": [{"name": "a:b"}, {"name": "a:b"}]}),
        (HackingConfig, {"window": 2}),
        (HackingConfig, {"false_alarm_rate": 0.0}),
        (HackingConfig, {"length_factor": 1.0}),
        (HackingConfig, {"stop_on": ["length", "partings"]}),
    ],
)
def test_out_of_range_is_refused(cls, values):
    with pytest.raises(ValidationError) as refusal:
        cls(**values)
    assert refusal.value.errors()[0]["loc"][0] == next(reversed(values))


@pytest.mark.parametrize("values", [{"top_p": 0.9}, {"top_k": 50}])
def test_a_cut_support_is_refused_while_training(values):
    with pytest.raises(ValidationError, match=r"expected 1\.0 and 0"):
        RolloutConfig(**values)


@pytest.mark.parametrize("values", [{}, {"path": "a.jsonl", "hub": "b"}])
def test_a_source_is_exactly_one(values):
    with pytest.raises(ValidationError, match="exactly one of path, hub, asset"):
        SourceConfig(**values)


def test_a_gate_is_not_normalised():
    with pytest.raises(ValidationError, match="x, gate: got normalize: true, expected a gate that reads its own"):
        RewardFunctionConfig(name="text:no_refusal", part="x", gate=True, normalize=True)


def test_something_must_score():
    with pytest.raises(ValidationError, match="at least one"):
        RewardConfig()
    with pytest.raises(ValidationError, match="at least one"):
        RewardConfig(gold=({"name": "text:no_refusal"},))  # which trains nothing


@pytest.mark.parametrize(("key", "value"), [("weight", 2.0), ("gate", True), ("normalize", False), ("clip", [0, 1])])
def test_gold_has_no_say_in_the_total(key, value):
    with pytest.raises(
        ValidationError, match=rf"{key}: got .*, expected no clip, gate, normalize, weight: .*; remove it"
    ):
        RewardConfig.model_validate({"model": "m", "gold": [{"name": "text:no_refusal", key: value}]})


def test_gold_and_trained_parts_of_one_function_have_names_of_their_own():
    both = RewardConfig.model_validate({"functions": [{"name": "a:b"}], "gold": [{"name": "a:b"}]})
    assert [one.key for one in both.gold] == ["gold/a:b"]
    assert both.weights == {"a:b": 1.0}
    assert GoldFunctionConfig(name="a:b", part="c").key == "gold/c"


def test_a_sign_that_cannot_come_does_not_end_a_run():
    PpoRunConfig(reward=REWARD, hacking={"stop_on": ["length"]})
    with pytest.raises(ValidationError, match=r"hacking\.stop_on: got parted without a gold function"):
        PpoRunConfig(reward=REWARD, hacking={"stop_on": ["length", "parted"]})
    with pytest.raises(ValidationError, match=r"hacking\.stop_on: got clipped without a clip, expected one: .*; set"):
        PpoRunConfig(reward=REWARD, hacking={"stop_on": ["clipped"]})
    cut = {"functions": [{"name": "text:no_refusal", "clip": [0.0, 1.0]}]}
    for reward in (cut, {"model": "m", "clip": 2.0}):
        PpoRunConfig(reward=RewardConfig.model_validate(reward), hacking={"stop_on": ["clipped"]})


@pytest.mark.parametrize("kind", [RewardFunctionConfig, GoldFunctionConfig])
def test_the_name_of_a_part_is_one_of_metrics_that_are_not_the_runs_own(kind):
    for part in ("short", "text:no_refusal", "style/short.v-2", "长度"):
        assert kind(name="text:no_refusal", part=part).part == part
    for part in ("", "a\nb", "a b", "/a", "a/", "a//b", "unscored", "unscored/timeout", "disagreement", "mean"):
        with pytest.raises(ValidationError, match=r"got .*, expected letters, digits, .* as metrics .*; rename it"):
            kind(name="text:no_refusal", part=part)


def test_a_reward_process_has_the_memory_to_start():
    assert RewardConfig.model_validate({"model": "m", "execution": {"memory_mb": 64}}).execution.memory_mb == 64
    with pytest.raises(ValidationError, match=r"got 63, expected at least 64: a process does not start .*; raise it"):
        RewardConfig.model_validate({"model": "m", "execution": {"memory_mb": 63}})


@pytest.mark.parametrize(("minibatch_size", "fits"), [(16, True), (8, True), (1, True), (7, False), (32, False)])
def test_minibatches_divide_a_step(minibatch_size, fits):
    ppo = PpoConfig(rollout_batch_size=8, num_samples_per_prompt=2, minibatch_size=minibatch_size)
    if fits:
        assert PpoRunConfig(reward=REWARD, ppo=ppo).ppo.minibatch_size == minibatch_size
    else:
        with pytest.raises(ValidationError, match=f"got {minibatch_size}, expected a divisor of the 16 sequences"):
            PpoRunConfig(reward=REWARD, ppo=ppo)


def test_roles_of_a_group_follow_the_one_whose_workers_are_given(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("policy: {num_workers: 2, gpus_per_worker: 1}\nreference: {cpus_per_worker: 0.5}\n")
    cluster = load_config(ClusterConfig, file=file)
    assert (cluster.reference.num_workers, cluster.reference.gpus_per_worker) == (2, 1)
    assert cluster.reference.cpus_per_worker == 0.5
    assert cluster.critic.num_workers == 1
    file.write_text("critic: {num_workers: 3}\ncolocate: [[reward_model, critic]]\n")
    cluster = load_config(ClusterConfig, file=file)
    assert (cluster.reward_model.num_workers, cluster.critic.num_workers, cluster.policy.num_workers) == (3, 3, 1)
    assert ClusterConfig.model_validate({"policy": {"num_workers": 2}, "colocate": []}).reference.num_workers == 1


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"colocate": (("policy", "judge"),)}, "colocate: got 'judge', expected some of policy, critic"),
        ({"colocate": ((), ("policy",))}, "expected groups of roles"),
        ({"colocate": (("policy", "critic"), ("policy", "reference"))}, "at most once"),
        (
            {"policy": {"num_workers": 2}, "reference": {"num_workers": 1}, "colocate": (("policy", "reference"),)},
            "num_workers: got policy 2, reference 1 of roles that share",
        ),
        ({"policy": {"resources": {"x": -1}}}, "policy.resources"),
        (
            {"rollout": {"num_engines": 2}, "colocate": (("policy", "rollout"),)},
            r"rollout\.num_engines: got 2 with roll",
        ),
        ({"rollout": {"num_engines": 2}, "colocate": (("reference", "rollout"),)}, "take rollout out of the group"),
        (
            {"rollout": {"max_engines": 2}, "colocate": (("reference", "rollout"),)},
            r"rollout\.max_engines: got 2 with",
        ),
        (
            {"policy": {"placement": "pack"}, "reference": {"placement": "spread"}},
            "different placements in .*'reference'",
        ),
    ],
)
def test_colocation_that_cannot_be_is_refused(values, reason):
    with pytest.raises(ValidationError, match=reason):
        ClusterConfig.model_validate(values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "got tensor_parallel_size=2, expected 1 with gpus_per_worker=0: .*; set gpus_per_worker: 1"),
        ({"gpus_per_worker": 0.5}, "expected 1 with gpus_per_worker=0.5"),
        ({"gpus_per_worker": 1, "engine": "transformers"}, "got tensor_parallel_size=2, expected 1: the transformers"),
    ],
)
def test_an_engine_that_cannot_be_split_is_refused(values, reason):
    with pytest.raises(ValidationError, match=reason):
        ClusterConfig.model_validate({"rollout": {"tensor_parallel_size": 2, **values}})


@pytest.mark.parametrize(
    "values", [{"min_engines": 2}, {"num_engines": 3, "max_engines": 2}, {"min_engines": 3, "max_engines": 2}]
)
def test_limits_that_leave_no_number_to_start_with_are_refused(values):
    with pytest.raises(ValidationError, match=r"min_engines, num_engines, max_engines: got \d, \d, \d, expected them"):
        ClusterConfig.model_validate({"rollout": values})


def test_a_number_of_engines_is_fixed_unless_limits_are_given():
    def limits(**rollout: int) -> tuple[int, int]:
        return ClusterConfig.model_validate({"rollout": rollout}).rollout.engine_limits

    assert limits(num_engines=2) == (2, 2)
    assert limits(num_engines=2, max_engines=4) == (2, 4)
    assert limits(num_engines=2, min_engines=1) == (1, 2)


def test_a_resource_of_ray_itself_is_no_pin():
    assert ClusterConfig.model_validate({"critic": {"resources": {"gold": 0.5}}}).critic.resources == {"gold": 0.5}
    with pytest.raises(ValidationError, match=r"got \['GPU'\], expected names of custom Ray resources"):
        ClusterConfig.model_validate({"critic": {"resources": {"GPU": 1}}})


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--kl.target", "6", "--kl.coef", "0"], "kl.coef: got 0 with kl.target=6, expected more than 0"),
        (["--kl.target", "6", "--kl.horizon", "3.2"], "kl.horizon: got 3.2 for steps of 16 sequences, expected more"),
        (["--reward.overlong_buffer", "65"], "reward.overlong_buffer: got 65, expected at most the 64 of rollout."),
        (["--critic.optimizer.adaptive_kl_target", "0.01"], "critic.optimizer.adaptive_kl_target: got 0.01"),
        (["--policy.optimizer.adaptive_kl_target", "0.01"], "policy.optimizer.adaptive_kl_target: got 0.01 with one"),
        (["--critic.warmup_steps", "10"], "critic.warmup_steps: got 10, expected less than the 10"),
    ],
)
def test_a_controller_that_cannot_steer_is_refused(words, part):
    rules = ["--reward.functions", "[{name: text:finished_sentence}]"]
    with pytest.raises(ValueError, match="1 problem") as refusal:
        load_config(PpoRunConfig, overrides=[*rules, *words])
    assert part in str(refusal.value)
    assert str(refusal.value).splitlines()[1].startswith(part.split(":")[0])


@pytest.mark.parametrize("num_prompts", [1, 7, 16, 50])
@pytest.mark.parametrize(("share", "fits"), [(0.1, False), (0.2, False), (0.201, True), (1.0, True)])
def test_a_config_takes_the_horizons_that_the_controller_takes(num_prompts, share, fits):
    """Golden border: a share of 0.2 of the sequences. The strongest move then takes the weight to just 0."""
    horizon = share * num_prompts
    kl = KlConfig(target=6.0, coef=0.1, horizon=horizon)
    ppo = PpoConfig(rollout_batch_size=num_prompts, minibatch_size=num_prompts)
    controller = AdaptiveKLController(0.1, 6.0, horizon)
    if fits:
        assert PpoRunConfig(reward=REWARD, kl=kl, ppo=ppo).kl.horizon == horizon
        assert controller.update(0.0, num_prompts) == pytest.approx(0.1 * (1 - 0.2 / share))
        assert controller.value > 0
        return
    with pytest.raises(ValueError, match=r"kl\.horizon: got .* could take the weight of the penalty to 0 or below"):
        PpoRunConfig(reward=REWARD, kl=kl, ppo=ppo)
    with pytest.raises(ValueError, match=r"kl\.horizon: got .* could take the weight of the penalty to 0 or below"):
        controller.update(0.0, num_prompts)


def test_values_at_their_borders_are_accepted():
    assert OptimizerConfig(betas=(0.0, 0.999), adaptive_bounds=(2.0, 2.0)).betas == (0.0, 0.999)
    assert RunConfig(seed=2**63 - 1).seed == 2**63 - 1
    rules = RewardConfig(functions=REWARD.functions, model_weight=-2.0, overlong_buffer=64)
    assert PpoRunConfig(reward=rules).reward.overlong_buffer == 64


def test_the_highest_seed_seeds_everything():
    from alignment.bootstrap import paired_bootstrap
    from alignment.generation import sampling_seed

    highest = RunConfig(seed=2**63 - 1).seed
    torch.manual_seed(highest)
    assert 0 <= sampling_seed(highest, "p", 0, 0) < 2**63
    assert paired_bootstrap([0.0, 1.0], [1.0, 1.0], num_resamples=10, seed=highest)[0] == 0.5


def test_controllers_at_their_borders_are_accepted():
    kl = KlConfig(target=6.0, coef=0.1, horizon=16)
    policy = PolicyConfig(optimizer=OptimizerConfig(adaptive_kl_target=0.01))
    config = PpoRunConfig(reward=REWARD, kl=kl, policy=policy, ppo=PpoConfig(ppo_epochs=2))
    assert (config.kl.horizon, config.ppo.rollout_batch_size) == (16, 16)
    assert PpoRunConfig(reward=REWARD, kl=KlConfig(coef=0, horizon=1)).kl.target is None


def test_only_a_policy_has_an_adaptive_rate():
    with pytest.raises(ValueError, match=r"training\.optimizer\.adaptive_kl_target: got 0\.1, expected null"):
        load_config(RewardModelRunConfig, overrides=["--training.optimizer.adaptive_kl_target", "0.1"])


def test_an_engine_that_cannot_be_split_is_not_split():
    with pytest.raises(ValueError, match="rollout: got tensor_parallel_size=2, expected 1"):
        load_config(ClusterConfig, overrides=["--rollout.tensor_parallel_size", "2"])


@pytest.mark.parametrize(
    ("path", "revision", "taken"),
    [("a/b", None, "abc"), ("a/b", "def", "def"), ("c/d", None, None), ("c/d", "def", "def")],
)
def test_a_revision_belongs_to_one_repository(path, revision, taken):
    model = ModelConfig(path="a/b", revision="abc", dtype="bfloat16")
    assert model.at(path, revision) == ModelConfig(path=path, revision=taken, dtype="bfloat16")


def test_configs_load_without_torch():
    code = "import sys, alignment.config, alignment.config_io; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("cls", "words"),
    [(PpoRunConfig, ["--reward.functions", "[{name: text:finished_sentence}]"]), (RewardModelRunConfig, [])],
)
def test_float16_is_refused_in_training(cls, words):
    with pytest.raises(ValueError, match=r"model\.dtype: got float16, expected float32 or bfloat16.*use bfloat16"):
        load_config(cls, overrides=[*words, "--model.dtype", "float16"])
    assert load_config(cls, overrides=[*words, "--model.dtype", "bfloat16"]).model.dtype == "bfloat16"
