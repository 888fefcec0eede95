"""Virtual tokens: what a prefix computes, where embeddings go, and that padding and batches change nothing."""

from __future__ import annotations

import pytest
import torch
from adapter_runs import IDS, VIRTUAL, attached, engine_of, hidden, loss_of, moved, named, train
from tiny import byte_tokenizer, write_tiny_model

from alignment import adapters, forward, models
from alignment.generation import generate

TOKENS = 5
ROWS = [[3, 7, 11, 19, 23, 5, 40, 8], [9, 4, 77, 6, 31]]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("virtual") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("virtual") / "llama")


def batch(rows, *, side: str, extra: int = 0):
    """ids, mask; padding holds an id that no embedding has."""
    width = max(map(len, rows)) + extra
    ids = torch.full((len(rows), width), 10**6)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return ids, mask


@pytest.mark.parametrize("kind", VIRTUAL)
def test_padding_and_neighbours_change_nothing(folder, kind):
    model = moved(folder, kind)
    alone = [hidden(model, *batch([row], side="right")) for row in ROWS]
    for side in ("left", "right"):
        for extra in (0, 3):
            ids, mask = batch(ROWS, side=side, extra=extra)
            with torch.no_grad():
                states = model.hidden(ids, mask)
            assert states.shape == (*ids.shape, model.model.config.hidden_size)
            for row, expected, real in zip(states, alone, mask, strict=True):
                torch.testing.assert_close(row[real.bool()], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_micro_batches_add_up_to_the_whole_gradient(folder, kind):
    found = []
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        model = moved(folder, kind)
        for rows in parts:
            loss_of(model, rows).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for whole, summed in zip(*found, strict=True):
        torch.testing.assert_close(whole, summed, rtol=1e-4, atol=1e-5)
        assert whole.abs().max() > 0


@pytest.mark.parametrize("kind", ["prefix", "p_tuning_v2"])
def test_a_prefix_is_keys_and_values_that_every_layer_attends_to(llama, kind):
    """Against attention by hand: rotary queries and keys at positions m, m + 1, ...; the prefix has no rotation."""
    model = moved(llama, kind)
    inner, tokens = model.model.model, model.model.virtual_tokens
    config = model.model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    ids = IDS[:1]
    with torch.no_grad():
        flat = tokens()
        prefix = flat.view(TOKENS, config.num_hidden_layers, 2, kv_heads, width)
        x = inner.embed_tokens(ids)
        places = torch.arange(TOKENS, TOKENS + ids.shape[1]).unsqueeze(0)
        cos, sin = inner.rotary_emb(x, places)
        for number, layer in enumerate(inner.layers):
            attention, y = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                linear(y).view(1, -1, count, width).transpose(1, 2)
                for linear, count in (
                    (attention.q_proj, heads),
                    (attention.k_proj, kv_heads),
                    (attention.v_proj, kv_heads),
                )
            )
            q, k = (states * cos + turned(states) * sin for states in (q, k))
            k = torch.cat([prefix[:, number, 0].transpose(0, 1).unsqueeze(0), k], 2).repeat_interleave(
                heads // kv_heads, 1
            )
            v = torch.cat([prefix[:, number, 1].transpose(0, 1).unsqueeze(0), v], 2).repeat_interleave(
                heads // kv_heads, 1
            )
            scores = q @ k.transpose(-1, -2) / width**0.5
            seen = torch.ones(ids.shape[1], TOKENS + ids.shape[1]).tril(TOKENS).bool()
            mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
            x = x + attention.o_proj(mixed.transpose(1, 2).reshape(1, -1, heads * width))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        torch.testing.assert_close(model.hidden(ids, torch.ones_like(ids)), inner.norm(x), rtol=1e-5, atol=1e-5)


def turned(states):
    one, other = states.chunk(2, -1)
    return torch.cat([-other, one], -1)


def test_embeddings_stand_in_front_and_positions_shift(folder):
    model = moved(folder, "prompt")
    words = model.model.get_input_embeddings()
    with torch.no_grad():
        whole = torch.cat([model.model.virtual_tokens.encoder.embedding.weight, words(IDS[0])]).unsqueeze(0)
        expected = model.model.base_model(inputs_embeds=whole).last_hidden_state[:, TOKENS:]
        torch.testing.assert_close(model.hidden(IDS[:1], torch.ones(1, 8)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "count"),
    [
        # m d; an MLP d -> h -> h -> d behind it; an LSTM of two directions and two layers, and 2h -> 2h -> d.
        ("prompt", {}, TOKENS * 32),
        ("p_tuning", {"encoder_hidden": 8}, TOKENS * 32 + (32 * 8 + 8) + (8 * 8 + 8) + (8 * 32 + 32)),
        (
            "p_tuning",
            {"encoder": "lstm", "encoder_hidden": 8},
            TOKENS * 32 + 2 * 4 * 8 * (32 + 8 + 2) + 2 * 4 * 8 * (16 + 8 + 2) + (16 * 16 + 16) + (16 * 32 + 32),
        ),
        # Two layers of 2 heads of 8 for keys and for values; an MLP 16 -> h -> 2 * 2 * 16 in front of them.
        ("prefix", {"encoder_hidden": 8}, TOKENS * 16 + (16 * 8 + 8) + (8 * 64 + 64)),
        ("p_tuning_v2", {}, TOKENS * 64),
    ],
)
def test_how_much_is_trained(llama, kind, settings, count):
    model, _ = attached(llama, kind, **settings)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count
    assert all(name.startswith("model.virtual_tokens.") for name in trained)
    assert all(p.dtype == torch.float32 for p in trained.values())


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tunings_encoder_can_be_dropped_in_the_end(llama, encoder, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model, method = attached(llama, "p_tuning", encoder=encoder)
    train(model, engine_of(model), method, 5)
    adapters.save_adapter(model.model, tmp_path, base=str(llama))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in saved.items()} == {"prompt_embeddings": (TOKENS, 32)}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path).eval()
    with torch.no_grad():
        theirs = loaded(input_ids=IDS[:1], attention_mask=torch.ones(1, 8)).logits[:, TOKENS:]
        ours = model.head(model.hidden(IDS[:1], torch.ones(1, 8)))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_the_projected_prefix_is_all_that_is_left_of_prefix_tuning(llama, tmp_path):
    from safetensors.torch import load_file

    model, method = attached(llama, "prefix")
    train(model, engine_of(model), method, 5)
    adapters.save_adapter(model.model, tmp_path, base=str(llama))
    (kept,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert kept.shape == (TOKENS, 64)
    direct, _ = attached(llama, "p_tuning_v2")
    with torch.no_grad():
        direct.model.virtual_tokens.encoder.embedding.weight.copy_(kept)
    assert torch.equal(hidden(direct), hidden(model))


@pytest.mark.parametrize("text", ["Answer", "ab"])
def test_prompt_tuning_starts_from_the_ids_of_its_text(llama, text):
    tokenizer = byte_tokenizer()
    model, _ = attached(llama, "prompt", text=text, tokenizer=tokenizer)
    ids = (tokenizer(text)["input_ids"] * TOKENS)[:TOKENS]
    words = model.model.get_input_embeddings().weight
    assert torch.equal(model.model.virtual_tokens(), words[ids])


def test_prompt_tuning_without_a_text_starts_from_words_drawn_by_seed(llama):
    one, other, again = (attached(llama, "prompt", seed=seed)[0].model for seed in (1, 2, 1))
    words = one.get_input_embeddings().weight
    start = one.virtual_tokens()
    assert all(bool((words == row).all(1).any()) for row in start)
    assert torch.equal(start, again.virtual_tokens())
    assert not torch.equal(start, other.virtual_tokens())


@pytest.mark.parametrize("kind", ["prompt", "p_tuning_v2"])
def test_a_start_does_what_its_words_in_front_would_do(llama, kind):
    tokenizer = byte_tokenizer()
    model, _ = attached(llama, kind, text="Answer", tokenizer=tokenizer)
    front = torch.tensor((tokenizer("Answer")["input_ids"] * TOKENS)[:TOKENS]).expand(len(IDS), -1)
    plain = models.load_causal_lm(str(llama))
    with torch.no_grad():
        expected = plain.hidden(torch.cat([front, IDS], 1), torch.ones(len(IDS), TOKENS + IDS.shape[1]))[:, TOKENS:]
    found = hidden(model, mask=torch.ones_like(IDS))
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_a_window_of_attention_drops_no_word_of_the_start(tmp_path):
    folder = write_tiny_model(tmp_path / "mistral", "mistral", sliding_window=3)
    model, _ = attached(folder, "p_tuning_v2")
    assert model.model.virtual_tokens().shape == (TOKENS, 64)


def test_a_text_without_a_token_is_refused(llama):
    with pytest.raises(ValueError, match=r"adapter.virtual_tokens.text: got '' .* expected some words"):
        attached(llama, "prompt", text="", tokenizer=byte_tokenizer())


@pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
def test_gradient_checkpointing_trains_embeddings_alike(folder, kind):
    found = []
    for checkpointing in (False, True):
        model = moved(folder, kind)
        if checkpointing:
            models.enable_gradient_checkpointing(model)
        loss_of(model).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-5)
        assert plain.abs().max() > 0


@pytest.mark.parametrize("kind", ["prefix", "p_tuning_v2"])
def test_gradient_checkpointing_of_a_prefix_is_refused(llama, kind):
    with pytest.raises(ValueError, match=r"model.gradient_checkpointing: got true .* drops the cached"):
        models.enable_gradient_checkpointing(moved(llama, kind))


@pytest.mark.parametrize("kind", VIRTUAL)
def test_rows_are_padded_whatever_the_model_would_choose(llama, kind):
    model = models.load_causal_lm(str(llama), layout="auto")
    assert model.layout == "packed"
    adapters.attach(model, type=kind, seed=0, total_updates=1)
    assert model.layout == "padded"


@pytest.mark.parametrize("kind", VIRTUAL)
def test_sampling_sees_them(folder, kind):
    """The sampler's log-probabilities are those of the trainer's forward."""
    model = moved(folder, kind)
    samples = generate(model, ROWS, [1, 2], max_new_tokens=6, temperature=0.8, stop_ids=frozenset(), max_batch=2)
    assert len({sample.response_ids for sample in samples}) == 2
    for row, sample in zip(ROWS, samples, strict=True):
        ids = torch.tensor([row + list(sample.response_ids)])
        response = torch.arange(ids.shape[1]).unsqueeze(0) >= len(row)
        with torch.no_grad():
            logprobs, _ = forward.response_logprobs(model, ids, torch.ones_like(ids), response, temperature=0.8)
        torch.testing.assert_close(logprobs[response], torch.tensor(sample.rollout_logprobs), rtol=1e-4, atol=1e-4)


def test_the_base_is_untouched(llama):
    base = named(models.load_causal_lm(str(llama)))
    model, method = attached(llama, "prefix")
    train(model, engine_of(model), method, 3)
    assert all(torch.equal(tensor, named(model)[name]) for name, tensor in base.items())
