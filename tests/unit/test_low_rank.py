"""LoRA's relatives and (IA)^3 do what their papers say: scales, norms, singular vectors, places of vectors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from adapter_runs import IDS, attached, engine_of, hidden, moved, named, train, write_model
from tiny import write_tiny_reward_model

from alignment import adapters, forward, models
from alignment.engines.torch import TorchEngine

R, ALPHA = 4, 8
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("low-rank") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def base(folder):
    return models.load_causal_lm(str(folder)).model


def layer_of(model, name=LAYER):
    return model.model.get_submodule(name)


def factors(layer, of="default"):
    return layer.lora_A[of].weight.detach(), layer.lora_B[of].weight.detach()


@pytest.mark.parametrize(("kind", "scale"), [("lora", ALPHA / R), ("rslora", ALPHA / math.sqrt(R))])
def test_the_update_is_scaled_by_alpha_over_r_or_its_root(folder, base, kind, scale):
    layer = layer_of(moved(folder, kind))
    a, b = factors(layer)
    x = torch.randn(3, a.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = x @ (base.get_submodule(LAYER).weight + scale * b @ a).T
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa", "adalora", "ia3"])
def test_the_start_is_the_base(folder, kind):
    exact = kind not in ("pissa", "dora")  # both put W together again
    difference = hidden(attached(folder, kind)[0]) - hidden(models.load_causal_lm(str(folder)))
    assert difference.abs().max() < (1e-9 if exact else 1e-5)


def test_dora_trains_norms_and_directions_apart(folder, base):
    model, _ = attached(folder, "dora")
    weight = base.get_submodule(LAYER).weight.detach()
    start = layer_of(model).lora_magnitude_vector["default"].weight.detach()
    torch.testing.assert_close(start, weight.norm(dim=1))
    layer = layer_of(moved(folder, "dora"))
    magnitude = layer.lora_magnitude_vector["default"].weight.detach()
    assert (magnitude - start).abs().max() > 0.05
    effective = layer(torch.eye(weight.shape[1])).T.detach()
    a, b = factors(layer)
    torch.testing.assert_close(effective.norm(dim=1), magnitude.abs())
    direction = weight + ALPHA / R * b @ a
    # The direction of W + BA, times a norm that may have changed its sign.
    cosine = torch.nn.functional.cosine_similarity(effective, direction, dim=1)
    torch.testing.assert_close(cosine, magnitude.sign())


def test_doras_norm_is_a_constant_to_the_gradient(folder, base):
    """Section 4.3 of the paper: as if ||V + dV|| were a number, which the gradient does not pass."""
    layer = layer_of(moved(folder, "dora"))
    weight = base.get_submodule(LAYER).weight.detach()
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    layer(x).square().sum().backward()
    a, b = (p.clone().requires_grad_() for p in factors(layer))
    magnitude = layer.lora_magnitude_vector["default"].weight.detach()
    moved_weight = weight + ALPHA / R * b @ a
    (x @ (moved_weight * (magnitude / moved_weight.detach().norm(dim=1)).unsqueeze(1)).T).square().sum().backward()
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, a.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_pissa_trains_the_largest_singular_directions(folder, base):
    layer = layer_of(attached(folder, "pissa")[0])
    weight = base.get_submodule(LAYER).weight.detach()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    a, b = factors(layer)
    product = ALPHA / R * b @ a
    torch.testing.assert_close(product, u[:, :R] * s[:R] @ v[:R], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.get_base_layer().weight.detach() + product, weight, rtol=1e-5, atol=1e-5)
    # A and B share the singular values, and their rows and columns are the singular vectors.
    for gram in (a @ a.T, b.T @ b):
        torch.testing.assert_close(gram, torch.diag(s[:R] * R / ALPHA), rtol=1e-4, atol=1e-5)
    assert not layer.lora_A["start"].weight.requires_grad


def test_a_fast_decomposition_finds_the_same_directions(folder):
    exact, fast, again = (layer_of(attached(folder, "pissa", pissa_iterations=count)[0]) for count in (None, 30, 30))
    products = [b @ a for a, b in map(factors, (exact, fast, again))]
    # No product of this rank can be nearer to W than the exact one; this one is all but as near.
    weight = layer_of(models.load_causal_lm(str(folder))).weight.detach()
    best, found = ((weight - ALPHA / R * product).norm() for product in products[:2])
    assert best <= found < 1.01 * best
    assert not torch.equal(products[1], products[0])
    assert torch.equal(products[1], products[2])


def test_a_pissa_run_goes_on_where_the_decomposition_comes_out_otherwise(folder, tmp_path):
    """Singular vectors have no sign of their own: another machine may find the other one."""
    model = moved(folder, "pissa")
    adapters.save_adapter(model.model, tmp_path, base=str(folder))
    other, _ = attached(folder, "pissa")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in (m for m in other.model.modules() if hasattr(m, "lora_A")):
            # Another split of the same weights.
            a, b = factors(layer, "start")
            moved_a = a + 0.1 * torch.randn(a.shape, generator=generator)
            layer.get_base_layer().weight += ALPHA / R * b @ (a - moved_a)
            a.copy_(moved_a)
    adapters.load_adapter(other.model, tmp_path)
    torch.testing.assert_close(hidden(other), hidden(model), rtol=1e-4, atol=1e-4)
    with adapters.adapter_disabled(other.model):
        off = hidden(other)
    torch.testing.assert_close(off, hidden(models.load_causal_lm(str(folder))), rtol=1e-4, atol=1e-4)


def test_ia3_scales_keys_values_and_the_feed_forwards_inner_activations(folder, base):
    model = moved(folder, "ia3")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    config = model.model.config
    keys = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert sum(p.numel() for p in trained.values()) == config.num_hidden_layers * (2 * keys + config.intermediate_size)
    assert {name.split(".")[-3] for name in trained} == {"k_proj", "v_proj", "down_proj"}
    x = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(0))
    inner = torch.randn(3, config.intermediate_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"):
            layer = layer_of(model, name)
            vector = layer.ia3_l["default"].flatten()
            assert (vector - 1).abs().max() > 0.05
            torch.testing.assert_close(layer(x), base.get_submodule(name)(x) * vector)  # the bias too
        layer = layer_of(model)
        torch.testing.assert_close(layer(inner), base.get_submodule(LAYER)(inner * layer.ia3_l["default"].flatten()))


def test_ia3_starts_at_one_and_is_no_matrix_to_weight_decay(folder):
    model, _ = attached(folder, "ia3")
    vectors = [p for p in model.parameters() if p.requires_grad]
    assert all(bool((p == 1).all()) for p in vectors)
    engine = TorchEngine(model.named_parameters(), lr=1e-3, total_updates=3, weight_decay=0.1)
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.0]


def test_ia3_says_which_names_it_does_not_know(folder):
    model = models.load_causal_lm(str(folder))
    for layer in model.model.model.layers:
        layer.mlp.last = layer.mlp.down_proj
        del layer.mlp.down_proj
    with pytest.raises(ValueError, match=r"adapter.type: got ia3 .*'last'.* expected keys, values .*target_modules"):
        adapters.attach(model, type="ia3", seed=0, total_updates=1)


def test_named_modules_alone_are_scaled(folder):
    model, _ = attached(folder, "ia3", target_modules=("v_proj",), last_layers=1)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == ["model.model.layers.1.self_attn.v_proj.ia3_l.default"]


@pytest.mark.parametrize("kind", ["dora", "pissa", "adalora", "ia3"])
def test_the_merged_model_with_a_head_scores_alike(tmp_path, kind):
    folder = write_tiny_reward_model(tmp_path / "reward")
    model, _ = attached(folder, kind, load=models.load_scalar_model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * p.requires_grad)
    adapters.export_merged(model.model, tmp_path / "merged")
    again = models.load_scalar_model(str(tmp_path / "merged"))
    with torch.no_grad():
        torch.testing.assert_close(
            forward.sequence_scores(again, IDS, torch.ones_like(IDS)),
            forward.sequence_scores(model, IDS, torch.ones_like(IDS)),
            rtol=1e-4,
            atol=1e-5,
        )


def test_lora_files_are_what_they_were(folder, tmp_path):
    """`attach` of lora and `attach_lora` are one: the same bytes in a checkpoint."""
    one, _ = attached(folder, "lora", seed=7)
    other = models.load_causal_lm(str(folder))
    adapters.attach_lora(other.model, r=R, alpha=ALPHA, seed=7)
    for model, name in ((one, "one"), (other, "other")):
        adapters.save_adapter(model.model, tmp_path / name, base="base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_a_copied_model_is_independent(folder):
    model = moved(folder, "bottleneck")
    twin = copy.deepcopy(model)
    before = hidden(model)
    train(twin, engine_of(twin), None, 3)
    assert torch.equal(hidden(model), before)
    assert named(model).keys() == named(twin).keys()
    assert not torch.equal(hidden(twin), before)
