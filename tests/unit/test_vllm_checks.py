"""What a vLLM engine would refuse after minutes is refused in a moment, in words about our own settings."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from actors.engines import vllm_checks, vllm_compat
from actors.engines.vllm_checks import check_vllm, model_length
from alignment.config import AdapterConfig, PpoRunConfig, VllmConfig

LENGTHS = {"data.max_prompt_tokens": 100, "rollout.max_new_tokens": 60}
GB = 2**30


def llama(**changes: int) -> LlamaConfig:
    shape = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 4,
        "max_position_embeddings": 4096,
    }
    return LlamaConfig(**(shape | changes))


@pytest.fixture(autouse=True)
def _a_release_that_works(monkeypatch):
    monkeypatch.setattr(vllm_compat, "version", lambda name: "0.32.0")


def check(settings: VllmConfig | None = None, *, endpoint=False, rank=0, device="cpu", dtype="float32", **shape: int):
    check_vllm(
        settings or VllmConfig(),
        llama(**shape),
        dtype=dtype,
        device=device,
        adapter_rank=rank,
        lengths=LENGTHS,
        endpoint=endpoint,
    )


def test_what_fits_passes():
    check()
    check(VllmConfig(max_model_len=160), endpoint=True, rank=512)
    check(device="cuda", hidden_size=20)


@pytest.mark.parametrize(
    ("settings", "shape", "said"),
    [
        (
            VllmConfig(max_model_len=159),
            {},
            r"max_model_len: got 159, expected at least 160 \(data.max_prompt_tokens 100",
        ),
        (VllmConfig(kv_cache_gb=1e-5), {}, r"kv_cache_gb: got 1e-05, expected at least .* of 160 tokens; raise it"),
        (VllmConfig(kv_cache_gb=1e6), {}, r"kv_cache_gb: got 1e\+06, expected less than the .* GB of this machine"),
        (None, {"hidden_size": 20}, r"attention heads of 10 for vLLM on a CPU.*rollout.engine: transformers"),
        (None, {"rank": 513}, r"policy.adapter.r: got 513, expected at most 512.*lora_sync: merged"),
        (None, {"num_hidden_layers": 10**5}, r"kv_cache_gb: got 1, expected at least"),
    ],
)
def test_what_does_not_fit_is_refused(settings, shape, said):
    with pytest.raises(ValueError, match=said):
        check(settings, **shape)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_the_cache_of_one_sequence_by_hand(dtype, width):
    """Keys and values of 4 layers and one head of 32, for 160 tokens and a block of 128 more."""
    needed = 2 * 4 * 32 * width * (160 + 128) / GB
    check(VllmConfig(kv_cache_gb=needed * 1.001), dtype=dtype)
    with pytest.raises(ValueError, match="kv_cache_gb"):
        check(VllmConfig(kv_cache_gb=needed * 0.999), dtype=dtype)


@pytest.mark.parametrize("found", ["0.23.1", "0.33.0", "1.0.0", "nightly"])
def test_other_releases_are_refused_without_importing_them(monkeypatch, found):
    monkeypatch.setattr(vllm_compat, "version", lambda name: found)
    with pytest.raises(ValueError, match=rf"vllm: got {found}, expected 0\.24 to 0\.32"):
        check()


@pytest.mark.parametrize(
    ("asked", "longest", "positions", "endpoint", "length"),
    [
        (None, 160, 131072, False, 160),  # a cache for all that the model can take would not fit
        (None, 20, 131072, False, vllm_checks.SHORTEST),
        (None, 20, 30, False, 30),
        (None, 160, 131072, True, 2048),
        (None, 160, 512, True, 512),
        (None, 4000, None, True, 4000),
        (300, 160, 131072, True, 300),
        (None, None, 512, False, None),
    ],
)
def test_the_length_that_an_engine_has_room_for(asked, longest, positions, endpoint, length):
    settings = VllmConfig(max_model_len=asked)
    assert model_length(settings, longest=longest, positions=positions, endpoint=endpoint) == length


@pytest.mark.parametrize(
    ("adapter", "rollout", "said"),
    [
        ({"r": 0}, {"lora_sync": "adapter"}, "rollout.lora_sync: got adapter with policy.adapter.r=0"),
        ({"r": 4}, {"temperature": 0.005}, "rollout.temperature"),
    ],
)
def test_configs_that_no_engine_can_follow(adapter, rollout, said):
    with pytest.raises(ValueError, match=said):
        PpoRunConfig.model_validate(
            {
                "reward": {"functions": [{"name": "text:finished_sentence"}]},
                "policy": {"adapter": AdapterConfig(**adapter)},
                "rollout": rollout,
            }
        )
