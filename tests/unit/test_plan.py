"""The planner: golden numbers by hand, counts and bytes against real models, placement, suggestions, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignment import logprobs, plan
from alignment.adapters import attach_lora
from alignment.config import ClusterConfig, PpoRunConfig, RewardModelRunConfig
from alignment.models import HfModel, enable_gradient_checkpointing
from alignment.planning import activations, memory, speed
from alignment.planning.memory import MicroBatch, Training, learner_memory, split_states, weight_bytes
from alignment.planning.placement import GB, Machines, place
from alignment.planning.processes import ProcessMemory, Splitting, memory_table, ppo_processes, role_groups
from alignment.planning.shape import SHAPES, llama_shape, read_shape, shape_of
from alignment.planning.suggest import Scenario, changed, changes, suggestions

TINY = llama_shape(hidden=8, layers=2, heads=2, kv_heads=1, intermediate=16, vocab=10, tied=True)
# One layer: q 8x8, k and v 8x4 each, o 8x8, gate, up, down 8x16 each, norms 2x8.
TINY_LAYER = 64 + 32 + 32 + 64 + 3 * 128 + 16
TINY_WEIGHTS = 2 * TINY_LAYER + 80 + 8
ROOT = Path(__file__).resolve().parents[2]


def test_weights_of_a_tiny_shape_by_hand():
    assert TINY.layer == TINY_LAYER == 592
    assert TINY.num_parameters() == TINY_WEIGHTS == 1272
    assert TINY.num_parameters(scalar_head=True) == TINY_WEIGHTS + 8
    assert llama_shape(hidden=8, layers=2, heads=2, kv_heads=1, intermediate=16, vocab=10).num_parameters() == 1352


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
def test_counts_are_those_of_the_real_model(kind):
    config = tiny_config(kind, 259)
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(model)
    assert shape.num_parameters() == sum(p.numel() for p in model.parameters())
    config.num_labels = 1
    scalar = AutoModelForSequenceClassification.from_config(config)
    assert shape.num_parameters(scalar_head=True) == sum(p.numel() for p in scalar.parameters())


def test_a_described_shape_is_the_one_that_a_config_gives():
    config = tiny_config("qwen2", 259)
    described = llama_shape(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64, vocab=259, qkv_bias=True)
    assert shape_of(AutoModelForCausalLM.from_config(config)) == described


@pytest.mark.parametrize(("name", "billions"), [("llama-7b", 6.738415616), ("llama-70b", 70.553706496)])
def test_published_sizes(name, billions):
    assert SHAPES[name].num_parameters() == billions * 1e9


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("last_layers", [None, 1, 5])
def test_adapter_weights_are_those_that_are_attached(kind, last_layers):
    model = AutoModelForCausalLM.from_config(tiny_config(kind, 259))
    expected = shape_of(model).adapter_parameters(4, "all-linear", last_layers)
    attach_lora(model, r=4, alpha=8, last_layers=last_layers)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected > 0


def test_adapter_weights_of_named_matrices_by_hand():
    """q: 4 (8 + 8), v: 4 (8 + 4), in 2 layers."""
    assert TINY.adapter_parameters(4, ("q_proj", "v_proj"), None) == 2 * (64 + 48)


@pytest.mark.parametrize(
    ("dtype", "weights", "masters"),
    [("float32", 4 * TINY_WEIGHTS, 0), ("bfloat16", 2 * TINY_WEIGHTS, 4 * TINY_WEIGHTS)],
)
def test_states_of_full_training_by_hand(dtype, weights, masters):
    found = split_states(TINY, Training(), TINY_WEIGHTS, dtype=dtype, scalar_head=False)
    assert found == (weights, (masters, 8 * TINY_WEIGHTS), 4 * TINY_WEIGHTS)


def test_each_zero_stage_divides_one_thing_more():
    def states(stage):
        return split_states(TINY, Training(ranks=4, zero_stage=stage), 1272, dtype="bfloat16", scalar_head=False)

    assert states(0) == (2544, (5088, 10176), 5088)
    assert states(1) == (2544, (1272, 2544), 5088)
    assert states(2) == (2544, (1272, 2544), 1272)
    assert states(3) == (2544 / 4 + 2 * TINY_LAYER, (1272, 2544), 1272)


def test_an_offloaded_optimiser_moves_to_the_host():
    micro = MicroBatch(rows=1, longest=4, answer=2)
    here = learner_memory(TINY, Training(), micro, dtype="bfloat16", scalar_head=False, on_gpu=True)
    away = learner_memory(TINY, Training(offload=True), micro, dtype="bfloat16", scalar_head=False, on_gpu=True)
    assert (here.host, away.host) == (0, 12 * TINY_WEIGHTS)
    assert here.total - away.total == 12 * TINY_WEIGHTS


def test_four_bits_are_for_the_matrices_of_the_layers():
    quantized = 2 * (TINY_LAYER - 16)
    expected = quantized * (0.5 + 1 / 64 + 1 / 4096) + 4 * (TINY_WEIGHTS - quantized)
    assert weight_bytes(TINY, dtype="float32", quantization="nf4") == expected
    assert memory.file_pages(TINY, Training(r=1, quantization="nf4"), width=4) == 4 * quantized
    assert memory.file_pages(TINY, Training(r=1), width=4) == 0


def test_cache_by_hand():
    """2 (keys, values) x 2 layers x 1 head x 4 numbers x 4 bytes x 3 rows x 5 tokens."""
    assert memory.cache_bytes(TINY, sequences=3, longest=5, width=4) == 2 * 2 * 4 * 4 * 3 * 5


def test_the_chunk_of_logits_is_the_learners():
    assert memory.CHUNK_SIZE == logprobs.CHUNK_SIZE
    found = activations.logits_bytes(
        TINY, positions=1000, width=2, chunk=512, scaled=True, entropy=False, training=True
    )
    assert found == 512 * 10 * (2 + 4 + 4 + 4)


def saved(model: HfModel, ids: torch.Tensor, mask: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, every storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(ids, mask)
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"r": 8},
        {"r": 8, "last_layers": 2},
        {"r": 8, "target_modules": ("q_proj", "v_proj")},
        {"r": 8, "target_modules": ("k_proj", "down_proj")},
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(dtype, padded, adapter):
    config = tiny_config("llama", 259, hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    causal = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    shape = shape_of(causal)
    if adapter:
        attach_lora(causal, alpha=8, **adapter)
    rows, longest = 3, 40
    ids, mask = torch.randint(0, 259, (rows, longest)), torch.ones(rows, longest, dtype=torch.bool)
    mask[0, -5:] = not padded
    found = saved(HfModel(causal, causal.get_output_embeddings()), ids, mask)
    width = memory.WIDTHS[dtype]
    expected = activations.saved_bytes(shape, rows=rows, longest=longest, width=width, padded=padded, **adapter)
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("adapter", [{}, {"r": 8}], ids=str)
def test_checkpointing_keeps_the_inputs_of_layers(adapter):
    config = tiny_config("llama", 259, hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    causal = AutoModelForCausalLM.from_config(config).eval()
    shape = shape_of(causal)
    if adapter:
        attach_lora(causal, alpha=8, **adapter)
    model = HfModel(causal, causal.get_output_embeddings())
    enable_gradient_checkpointing(model)
    ids, mask = torch.randint(0, 259, (3, 40)), torch.ones(3, 40, dtype=torch.bool)
    mask[0, -5:] = False
    size = {"rows": 3, "longest": 40, "width": 4}
    expected = activations.saved_bytes(shape, checkpointing=True, **size, **adapter)
    targets = shape.matrices if adapter else ()
    again = 120 * activations.layer_bytes(shape, width=4, longest=40, r=adapter.get("r", 0), targets=targets)
    # Sine and cosine live beside what is saved.
    shared = 120 * 2 * shape.head_dim * 4
    assert expected - again - shared == pytest.approx(saved(model, ids, mask), rel=0.03)


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


def scenario(config, *, cluster=None, **machines):
    return Scenario(
        config=config, cluster=cluster or ClusterConfig(), splitting=Splitting(), machines=Machines(**machines)
    )


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
            "zero_stage: 1",
        ),
    ],
)  # fmt: skip
def test_the_first_suggestion_is_the_smallest_change_that_fits(settings, cluster, machines, first):
    here = scenario(config_of(**settings), cluster=cluster, **machines)

    def count(other):
        return processes(other.config, other.cluster, splitting=other.splitting)

    assert not place(count(here), here.machines).fits
    found = suggestions(here, count)
    assert found[0] == first
    by_words = dict(changes(here))
    for words in found:
        after = by_words[words](here)
        assert place(count(after), after.machines).fits
    skipped = list(by_words)[: list(by_words).index(first)]
    assert all(not place(count(by_words[words](here)), here.machines).fits for words in skipped)


def test_a_row_of_changes_when_no_single_one_fits():
    here = scenario(
        config_of(), cluster=gpus(), gpus_per_node=5, gpu_memory_gb=16, cpus_per_node=8, node_memory_gb=512
    )
    found = suggestions(here, lambda other: processes(other.config, other.cluster, splitting=other.splitting))
    assert len(found) == 1
    assert found[0].startswith("all of: ")
    assert "model.dtype: bfloat16" in found[0]


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["policy, full, 2 x 160", "policy, LoRA on 10 layers, 4 x 160"])
def test_memory_is_within_15_percent_of_what_a_real_learner_takes(name):
    from alignment.data.model_assets import resolve_model

    sys.path.insert(0, str(ROOT))
    from benchmarks.planner import CASES, predicted_mb, run_case

    path = resolve_model("asset:smollm2-135m-instruct")
    found = run_case(name, path)["peak_mb"]
    assert predicted_mb(CASES[name], read_shape(path)) == pytest.approx(found, rel=0.15)


def test_planning_needs_no_ray():
    code = "import sys, alignment.plan; print(*[name for name in ('ray', 'actors', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
