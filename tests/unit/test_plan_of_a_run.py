"""The planner on a whole run: what processes share, where they stand, what would fit, how long it takes, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignment import plan
from alignment.config import ROLES, ClusterConfig, PpoRunConfig, RankRunConfig, RewardModelRunConfig, RoleConfig
from alignment.planning import memory, speed
from alignment.planning.memory import Training, weight_bytes
from alignment.planning.placement import GB, Machines, place
from alignment.planning.processes import (
    ProcessMemory,
    memory_table,
    ppo_processes,
    ranking_processes,
    role_groups,
)
from alignment.planning.rows import reward_model_processes
from alignment.planning.shape import SHAPES, llama_shape
from alignment.planning.suggest import Change, Scenario, changed, changes, fits_after, suggestions

TINY = llama_shape(hidden=8, layers=2, heads=2, kv_heads=1, intermediate=16, vocab=10, tied=True)
# One layer: q 8x8, k and v 8x4 each, o 8x8, gate, up, down 8x16 each, norms 2x8.
TINY_LAYER = 64 + 32 + 32 + 64 + 3 * 128 + 16
TINY_WEIGHTS = 2 * TINY_LAYER + 80 + 8
ROOT = Path(__file__).resolve().parents[2]


def config_of(**sections):
    return PpoRunConfig.model_validate({"reward": {"model": "m"}, "rollout": {"engine": "transformers"}, **sections})


def processes(config, cluster=None, shape="llama-7b", **settings):
    shapes = dict.fromkeys(("policy", "critic", "reward_model"), SHAPES[shape])
    return ppo_processes(config, cluster or ClusterConfig(), shapes, engine="transformers", **settings)


def test_roles_of_one_process_share_what_they_share():
    whole = weight_bytes(SHAPES["llama-7b"], dtype="float32")
    together = ClusterConfig.model_validate({"colocate": [["policy", "reference", "rollout"]]})
    lora = {p.name: p for p in processes(config_of(policy={"adapter": {"r": 8}}), together)}
    roles = lora["policy + reference + rollout"].roles
    assert (roles["reference"].weights, roles["rollout"].weights) == (0, 0)
    full = {p.name: p for p in processes(config_of(), together)}["policy + reference + rollout"].roles
    assert (full["reference"].weights, full["rollout"].weights) == (whole, 0)
    apart = {p.name: p for p in processes(config_of(policy={"adapter": {"r": 8}}), ClusterConfig(colocate=()))}
    assert apart["reference"].roles["reference"].weights == whole


def test_one_peak_counts_of_roles_that_take_turns():
    process = processes(config_of(policy={"adapter": {"r": 8}}))[0]
    policy, reference = process.roles["policy"], process.roles["reference"]
    assert process.name == "policy + reference"
    assert policy.passing > reference.passing > 0
    assert process.roles_bytes == policy.held + policy.passing + reference.held
    assert f"{policy.total / 2**20:,.0f}" in memory_table([process])


def test_a_run_without_a_reward_model_has_none():
    config = PpoRunConfig.model_validate({"reward": {"functions": [{"name": "text:finished_sentence"}]}})
    assert all("reward_model" not in process.roles for process in processes(config))
    assert role_groups(ClusterConfig(colocate=(("critic", "reward_model"),)), ("critic",)) == [("critic",)]


def process_of(gpus, *, cpus=1.0, workers=1, held=0.0, name="policy"):
    role = memory.RoleMemory(weights=held)
    return ProcessMemory(roles={name: role}, num_workers=workers, cpus=cpus, gpus=gpus)


def test_shares_of_a_gpu_fill_one_before_the_next():
    machines = Machines(nodes=2, gpus_per_node=2, cpus_per_node=8)
    placed = place([process_of(0.5, workers=5), process_of(2, name="rollout")], machines)
    used = [[len(gpu.processes) for gpu in node.gpus] for node in placed.nodes]
    assert used == [[2, 2], [1, 0]]
    assert placed.missing == ["rollout: 1 of 1 processes find no node with 1 CPUs and 2 GPUs free"]


def test_what_is_missing_is_named_with_its_size():
    machines = Machines(gpus_per_node=1, gpu_memory_gb=10, cpus_per_node=8)
    placed = place([process_of(0.5, held=8 * GB), process_of(0.5, held=5 * GB, name="critic")], machines)
    context = 2 * 600 / 1024
    assert placed.missing == [f"policy, critic: {3 + context:.1f} GB missing on GPU 0 of node 0, which has 10"]
    assert placed.short_of == {"policy", "critic"}
    assert place([process_of(0.0, cpus=9)], machines).missing != []


def test_calls_that_take_turns_are_not_at_their_peaks_together():
    small, large = (memory.RoleMemory(weights=4.0 * GB, activations=peak * GB) for peak in (1.0, 3.0))

    def used(**settings):
        both = [
            ProcessMemory(roles={name: role}, num_workers=1, cpus=1, gpus=0, **settings)
            for name, role in (("policy", small), ("critic", large))
        ]
        return place(both, Machines(cpus_per_node=2)).nodes[0].used / GB

    assert (used(), used(takes_turns=True)) == (12, 11)
    turns = {p.name: p.takes_turns for p in processes(config_of(), ClusterConfig(critic=RoleConfig(num_workers=2)))}
    assert turns == {"policy + reference": True, "critic": False, "reward_model": True, "rollout": True}


def scenario(config, *, cluster=None, **machines):
    return Scenario(config=config, cluster=cluster or ClusterConfig(), machines=Machines(**machines))


def count(other):
    return processes(other.config, other.cluster)


def gpus(**learner):
    one = {"gpus_per_worker": 1}
    roles = dict.fromkeys(("critic", "reference", "reward_model"), one)
    rollout = {"engine": "transformers", **one}
    return ClusterConfig.model_validate(
        {**roles, "policy": {**one, **learner}, "critic": {**one, **learner}, "rollout": rollout, "colocate": []}
    )


@pytest.mark.parametrize(
    ("settings", "cluster", "machines", "first"),
    [
        (
            {"model": {"dtype": "bfloat16"}, "policy": {"micro_batch_size": 64}, "critic": {"micro_batch_size": 64},
             "rollout": {"engine": "transformers", "max_new_tokens": 512}, "ppo": {"rollout_batch_size": 64}},
            gpus(), {"gpus_per_node": 8, "gpu_memory_gb": 140, "cpus_per_node": 8, "node_memory_gb": 512},
            "policy.micro_batch_size: 1, critic.micro_batch_size: 1",
        ),
        (
            {"model": {"dtype": "bfloat16"}}, gpus(num_workers=4),
            {"gpus_per_node": 16, "gpu_memory_gb": 80, "cpus_per_node": 8, "node_memory_gb": 512},
            "policy.zero_stage: 2, critic.zero_stage: 2",
        ),
    ],
)  # fmt: skip
def test_the_first_suggestion_is_the_smallest_change_that_fits(settings, cluster, machines, first):
    here = scenario(config_of(**settings), cluster=cluster, **machines)
    assert not place(count(here), here.machines).fits
    found = suggestions(here, count)
    assert found[0] == first
    tried = list(changes(here))
    words = [change.words for change in tried]
    assert all(fits_after(here, [tried[words.index(one)]], count) for one in found)
    assert not any(fits_after(here, [change], count) for change in tried[: words.index(first)])


def test_what_sets_more_than_is_enough_is_no_suggestion_of_its_own():
    cluster = changed(gpus(num_workers=2), {"reference.num_workers": 2})
    config = config_of(model={"dtype": "bfloat16"})
    here = scenario(config, cluster=cluster, gpus_per_node=8, gpu_memory_gb=68, cpus_per_node=8, node_memory_gb=512)
    enough, more = {"policy.zero_stage": 3, "critic.zero_stage": 3}, {"reference.zero_stage": 3}
    assert fits_after(here, [Change(cluster={**enough, **more})], count)
    found = suggestions(here, count)
    assert found[0] == "policy.zero_stage: 3, critic.zero_stage: 3"
    assert not any("reference.zero_stage" in words for words in found)


def test_a_row_of_changes_when_no_single_one_fits():
    here = scenario(
        config_of(), cluster=gpus(), gpus_per_node=5, gpu_memory_gb=16, cpus_per_node=8, node_memory_gb=512
    )
    found = suggestions(here, count)
    assert len(found) == 1
    assert found[0].startswith("all of: ")
    assert "model.dtype: bfloat16" in found[0]


@pytest.mark.parametrize("role", ["policy", "critic", "reference", "reward_model"])
def test_a_role_is_split_as_its_own_settings_say(role):
    cluster = ClusterConfig.model_validate({role: {"num_workers": 4, "zero_stage": 3}, "colocate": []})
    whole = {p.name: p.roles[p.name] for p in processes(config_of(), ClusterConfig(colocate=()))}
    split = {p.name: p.roles[p.name] for p in processes(config_of(), cluster)}
    assert split[role].weights == whole[role].weights / 4
    assert split[role].moments == whole[role].moments / 4
    assert 0 < split[role].gathered < whole[role].weights
    del split[role], whole[role]
    assert split == whole


def test_a_budget_counts_instead_of_rows():
    def micro(**settings):
        both = {"policy": settings, "critic": settings, "reward": {"model": "m", **settings}}
        return {role: memory.activations for p in processes(config_of(**both)) for role, memory in p.roles.items()}

    longest = config_of().data.max_prompt_tokens + config_of().rollout.max_new_tokens
    budget, rows = micro(max_tokens_per_micro_batch=3 * longest), micro(micro_batch_size=3)
    assert budget == rows != micro(micro_batch_size=4)


def test_a_pair_is_two_sequences():
    def micro(**settings):
        config = RewardModelRunConfig.model_validate({"training": {"batch_size": 8, **settings}})
        return reward_model_processes(config, ClusterConfig(), TINY)[0].roles["reward_model"].activations

    longest = RewardModelRunConfig().data.max_tokens
    assert micro(micro_batch_size=3) == micro(max_tokens_per_micro_batch=6 * longest) == 3 * micro(micro_batch_size=1)
    assert micro(micro_batch_size=99) == micro(micro_batch_size=8)


def test_what_cannot_be_split_is_refused_and_not_suggested():
    four_bits = config_of(policy={"adapter": {"r": 8, "quantization": "nf4"}})
    cluster = gpus(num_workers=4, zero_stage=3)
    with pytest.raises(ValueError, match=r"policy\.zero_stage: got 3 of engine torch with adapter\.quantization nf4"):
        processes(four_bits, cluster)
    here = scenario(four_bits, cluster=gpus(num_workers=4), gpus_per_node=16, cpus_per_node=64, node_memory_gb=512)
    assert not fits_after(here, [Change(cluster={"policy.zero_stage": 3})], count)
    assert fits_after(here, [Change(cluster={"critic.zero_stage": 3})], count)
    # torch has no stage 1, and to offload takes DeepSpeed.
    words = [change.words for change in changes(here)]
    assert "policy.zero_stage: 2" in words
    assert not any("zero_stage: 1" in one for one in words)
    assert "critic.engine: deepspeed, critic.zero_stage: 2, critic.offload: optimizer" in words


def test_a_budget_is_lowered_to_the_longest_row():
    config = config_of(policy={"max_tokens_per_micro_batch": 4096}, critic={"micro_batch_size": 8})
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    first = next(iter(changes(scenario(config))))
    assert first.words == f"policy.max_tokens_per_micro_batch: {longest}, critic.micro_batch_size: 1"
    assert first.of(scenario(config)).config.critic.micro_batch_size == 1


def test_roles_that_crowd_one_gpu_get_one_each():
    cluster = ClusterConfig.model_validate({role: {"gpus_per_worker": 0.2} for role in ROLES})
    config = config_of(model={"dtype": "bfloat16"}, policy={"adapter": {"r": 8}}, critic={"adapter": {"r": 8}})
    here = scenario(config, cluster=cluster, gpus_per_node=4, gpu_memory_gb=40, cpus_per_node=8, node_memory_gb=64)
    found = suggestions(here, count)
    assert ", ".join(f"{role}.gpus_per_worker: 1.0" for role in ROLES) in found


def test_a_changed_config_is_checked():
    assert changed(config_of(), {"policy.adapter.r": 4}).policy.adapter.r == 4
    with pytest.raises(ValueError, match=r"adapter\.quantization"):
        changed(config_of(), {"policy.adapter.quantization": "nf4"})


def test_operations_by_hand():
    """2 rows x 5 tokens: 2 layers of 576 weights in matrices and 4 x 8 x 5 of attention; 3 rows of logits."""
    forward = 10 * 2 * (2 * 576 + 160) + 2 * 80 * 3
    assert speed.forward_operations(TINY, sequences=2, longest=5, positions=3) == forward
    size = {"sequences": 2, "longest": 5, "positions": 3}
    assert speed.update_operations(TINY, Training(), **size) == 3 * forward
    assert speed.update_operations(TINY, Training(checkpointing=True), **size) == 4 * forward
    adapters = TINY.adapter_parameters(4, "all-linear", 1)
    lora = speed.update_operations(TINY, Training(r=4, last_layers=1), **size)
    assert lora == forward + (forward - 480) / 2 + 480 + 6 * adapters * 10


def test_decoding_takes_the_slower_of_memory_and_products():
    rates = speed.Rates(tflops=1e-6, gbps=1e-6, efficiency=1.0)
    reading = 4 * TINY_WEIGHTS / 1e3
    assert speed.decode_seconds(TINY, rates, rows=1, steps=3, dtype="float32") == pytest.approx(3 * reading)
    multiplying = 2 * TINY_WEIGHTS * 8000 / 1e6
    assert speed.decode_seconds(TINY, rates, rows=8000, steps=3, dtype="float32") == pytest.approx(3 * multiplying)


def test_one_pass_saves_two_forward_passes():
    shapes = dict.fromkeys(("policy", "critic", "reward_model"), TINY)
    rates = speed.Rates(tflops=1.0, gbps=1.0, efficiency=0.5)
    two = speed.phase_seconds(config_of(), ClusterConfig(), shapes, rates)
    one = speed.phase_seconds(config_of(ppo={"one_pass": True}), ClusterConfig(), shapes, rates)
    assert set(two) - set(one) == {"old logprobs", "values"}
    assert two["policy update"] == pytest.approx(3 * two["old logprobs"])
    table = speed.speed_table({"generate": 30.0, "score": 6.0}, steps=100, gpus=8, rates=rates)
    assert "1.00 hours, 8.00 GPU-hours on 8 GPUs" in table


def command(tmp_path, *flags, **sections):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"reward": {"model": "m"}, "rollout": {"engine": "transformers"}, **sections}))
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("rollout: {engine: transformers}\n")
    return ["--config", str(file), "--cluster", str(cluster), "--cpus-per-node", "8", *flags]


def test_the_command_says_whether_it_fits(tmp_path, capsys):
    assert plan.main(command(tmp_path, "--shape", "smollm2-135m", "--node-memory-gb", "64")) == 0
    assert "\nfits" in capsys.readouterr().out
    flags = ["--shape", "llama-7b", "--node-memory-gb", "64", "--matmul-tflops", "0.2", "--memory-gbps", "20"]
    assert plan.main(command(tmp_path, *flags)) == 2
    out = capsys.readouterr().out
    assert "GB missing on node 0, which has 64" in out
    assert "would fit: all of: " in out
    assert "policy update" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes", "0"], "--nodes: got 0, expected more than 0"),
        (["--gpus-per-node", "-1"], "--gpus-per-node: got -1, expected 0 or more"),
        (["--matmul-tflops", "1"], "--matmul-tflops, --memory-gbps: got (1.0, None), expected both above 0"),
        (["--ppo.minibatch_size", "0"], "ppo.minibatch_size"),
        (["--no.such_key", "1"], "no: got an unknown key"),
    ],
)
def test_refusals(tmp_path, capsys, flags, message):
    assert plan.main(command(tmp_path, "--shape", "smollm2-135m", *flags)) == 2
    assert message in capsys.readouterr().err


def test_a_config_that_is_not_there_is_refused(tmp_path, capsys):
    assert plan.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "which is no file" in capsys.readouterr().err


def test_a_reward_model_run_has_one_role(tmp_path, capsys):
    file = tmp_path / "reward.yaml"
    file.write_text("training: {micro_batch_size: 2}\n")
    flags = ["--config", str(file), "--cluster", str(ROOT / "cluster" / "local.yaml"), "--shape", "smollm2-135m"]
    assert plan.main([*flags, "--cpus-per-node", "2", "--node-memory-gb", "32"]) == 0
    assert "1 x (reward_model)" in capsys.readouterr().out
    assert isinstance(plan.load_run(file, []), RewardModelRunConfig)


def test_a_ranking_has_what_answers_and_what_scores(tmp_path, capsys):
    file = tmp_path / "rank.yaml"
    file.write_text("reward: {model: m}\nrollout: {engine: transformers}\nranking: {batch_size: 8}\n")
    flags = ["--config", str(file), "--cluster", str(ROOT / "cluster" / "local.yaml"), "--shape", "smollm2-135m"]
    flags += ["--cpus-per-node", "2", "--gpus-per-node", "0"]
    assert plan.main([*flags, "--node-memory-gb", "32"]) == 0
    said = capsys.readouterr().out
    assert "1 x (reward_model)" in said
    assert "1 x (rollout)" in said
    assert "policy" not in said
    assert plan.main([*flags, "--node-memory-gb", "1.9"]) == 2
    assert "would fit: model.dtype: bfloat16" in capsys.readouterr().out
    config, shapes = plan.load_run(file, []), dict.fromkeys(("policy", "reward_model"), SHAPES["smollm2-135m"])
    assert isinstance(config, RankRunConfig)
    few, many = (
        {p.name: p for p in ranking_processes(changed(config, wanted), ClusterConfig(), shapes, engine="transformers")}
        for wanted in ({}, {"ranking.num_samples_per_prompt": 8})
    )
    assert many["rollout"].roles["rollout"].activations == 2 * few["rollout"].roles["rollout"].activations
    # A row of scores is as wide whoever asks: a ranking's reward model is that of a PPO run with as many answers.
    ppo = PpoRunConfig.model_validate(
        {
            "reward": {"model": "m"},
            "ppo": {"rollout_batch_size": 8, "num_samples_per_prompt": 4},
            "rollout": {"engine": "transformers"},
        }
    )
    judged = {
        p.name: p for p in ppo_processes(ppo, ClusterConfig(), {**shapes, "critic": TINY}, engine="transformers")
    }
    assert few["reward_model"] == judged["reward_model"]


def test_planning_needs_no_ray():
    code = "import sys, alignment.plan; print(*[name for name in ('ray', 'actors', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_models_of_an_ensemble_are_held_together_and_run_in_turn():
    one, two = config_of(), config_of(reward={"model": "m", "ensemble": {"models": ["n"]}})
    cluster = ClusterConfig(colocate=())
    shapes = dict.fromkeys(("policy", "critic", "reward_model"), SHAPES["llama-7b"])

    def judge(config, shapes):
        found = ppo_processes(config, cluster, shapes, engine="transformers")
        return {p.name: p for p in found}["reward_model"].roles["reward_model"]

    alone, same = judge(one, shapes), judge(two, shapes)
    assert (same.weights, same.passing) == (2 * alone.weights, alone.passing)
    mixed = judge(two, {**shapes, "reward_model/1": TINY})
    tiny = judge(one, {**shapes, "reward_model": TINY})
    assert mixed.weights == alone.weights + tiny.weights
    assert mixed.passing == alone.passing > tiny.passing
