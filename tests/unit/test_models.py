"""The forwards of the four models: padding is inert, positions are right, heads are real."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import write_tiny_model, write_tiny_reward_model

from alignment import adapters, forward, models
from alignment.logprobs import token_logprobs


def batch_of(lengths, prompt_lengths, width, *, left=False, garbage=0):
    torch.manual_seed(3)
    ids = torch.full((len(lengths), width), garbage)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    response = torch.zeros_like(mask)
    for i, (n, p) in enumerate(zip(lengths, prompt_lengths, strict=True)):
        tokens = torch.randint(3, 200, (n,))
        start = width - n if left else 0
        ids[i, start : start + n] = tokens
        mask[i, start : start + n] = True
        response[i, start + p : start + n] = True
    return ids, mask, response


def test_chunked_logprobs_equal_the_models_own_logits(any_model_folder):
    model = models.load_causal_lm(str(any_model_folder))
    ids, mask, response = batch_of([9, 6], [3, 2], 9)
    with torch.no_grad():
        got, entropy = forward.response_logprobs(model, ids, mask, response, temperature=0.7, with_entropy=True)
        whole = token_logprobs(model.model(input_ids=ids, attention_mask=mask.long()).logits, ids, temperature=0.7)
    torch.testing.assert_close(got[response], whole[response], rtol=1e-5, atol=1e-5)
    assert (got[~response] == 0).all()
    assert entropy is not None
    assert (entropy[response] > 0).all()


@pytest.mark.parametrize("garbage", [0, 2, 10**6])
def test_padding_side_width_and_content_change_nothing(any_model_folder, garbage):
    model = models.load_causal_lm(str(any_model_folder))
    ids, mask, response = batch_of([7, 4], [3, 2], 7)
    wide, wide_mask, wide_response = batch_of([7, 4], [3, 2], 12, garbage=garbage)
    left, left_mask, left_response = batch_of([7, 4], [3, 2], 12, left=True, garbage=garbage)
    with torch.no_grad():
        tight = forward.response_logprobs(model, ids, mask, response, temperature=1.0)[0][response]
        right = forward.response_logprobs(model, wide, wide_mask, wide_response, temperature=1.0)[0][wide_response]
        padded_left = forward.response_logprobs(model, left, left_mask, left_response, temperature=1.0)[0][
            left_response
        ]
    torch.testing.assert_close(tight, right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tight, padded_left, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_chunked_form_equal_those_of_whole_logits(any_model_folder):
    model = models.load_causal_lm(str(any_model_folder))
    ids, mask, response = batch_of([9, 6], [3, 2], 9)
    weights = torch.linspace(-1, 1, int(response.sum()))

    def gradients(logprobs):
        model.zero_grad()
        (logprobs[response] * weights).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    chunked = gradients(forward.response_logprobs(model, ids, mask, response, temperature=1.0)[0])
    whole = gradients(token_logprobs(model.model(input_ids=ids, attention_mask=mask.long()).logits, ids))
    for a, b in zip(chunked, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_value_speaks_of_the_state_before_its_token(tiny):
    model = models.load_scalar_model(str(tiny / "policy"), head="random", seed=5)
    ids, mask, _ = batch_of([6], [2], 6)
    with torch.no_grad():
        values = forward.response_values(model, ids, mask)
        changed = ids.clone()
        changed[0, 4] = 77
        after = forward.response_values(model, changed, mask)
    assert values[0, 0] == 0
    torch.testing.assert_close(values[0, :5], after[0, :5])
    assert not torch.isclose(values[0, 5], after[0, 5])


def test_score_is_read_at_the_last_attended_token_whatever_the_padding(tiny):
    model = models.load_scalar_model(str(tiny / "reward"))
    ids, mask, _ = batch_of([7, 4, 5], [2, 2, 2], 9, garbage=2)
    left, left_mask, _ = batch_of([7, 4, 5], [2, 2, 2], 11, left=True, garbage=2)
    with torch.no_grad():
        scores = forward.sequence_scores(model, ids, mask)
        alone = torch.cat(
            [forward.sequence_scores(model, ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate([7, 4, 5])]
        )
        torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scores, forward.sequence_scores(model, left, left_mask), rtol=1e-5, atol=1e-5)
        # transformers reads the same head, one row at a time.
        direct = model.model(input_ids=ids[1:2, :4]).logits.squeeze()
    torch.testing.assert_close(scores[1], direct, rtol=1e-5, atol=1e-5)


def test_a_reward_model_without_its_head_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"got architectures \['LlamaForCausalLM'\].*expected"):
        models.load_scalar_model(str(tiny / "policy"))
    folder = write_tiny_reward_model(tmp_path / "two")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="2 labels"):
        models.load_scalar_model(str(folder))


def test_a_head_missing_from_the_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_tiny_reward_model(tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"score\.weight"):
        models.load_scalar_model(str(folder))


def test_save_and_load_keep_every_bit(tmp_path):
    first = models.load_causal_lm(str(write_tiny_model(tmp_path / "a", seed=1)))
    second = models.load_causal_lm(str(write_tiny_model(tmp_path / "b", seed=2)))
    models.save_model(first, tmp_path / "saved")
    models.load_weights(second, tmp_path / "saved")
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_gradient_checkpointing_changes_memory_not_gradients(any_model_folder):
    ids, mask, response = batch_of([9, 6], [3, 2], 9)
    found = []
    for checkpointing in (False, True):
        model = models.load_causal_lm(str(any_model_folder))
        if checkpointing:
            models.enable_gradient_checkpointing(model)
        forward.response_logprobs(model, ids, mask, response, temperature=1.0)[0].sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def trained_adapter(folder, **settings):
    model = models.load_causal_lm(str(folder))
    adapters.attach_lora(model.model, r=4, alpha=8, seed=7, **settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def test_adapter_off_is_the_base_and_gradients_come_back(any_model_folder):
    base = models.load_causal_lm(str(any_model_folder))
    model = trained_adapter(any_model_folder)
    ids, mask, _ = batch_of([6, 5], [2, 2], 6)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        plain = base.hidden(ids, mask)
        assert not torch.allclose(model.hidden(ids, mask), plain, atol=1e-3)
        with adapters.adapter_disabled(model.model):
            assert torch.equal(model.hidden(ids, mask), plain)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_merged_weights_give_the_adapted_models_hidden_states(any_model_folder):
    model = trained_adapter(any_model_folder)
    merged = models.load_causal_lm(str(any_model_folder))
    parameters = dict(merged.model.named_parameters())
    with torch.no_grad():
        for name, tensor in adapters.merged_weights(model.model):
            parameters[name].copy_(tensor)
        ids, mask, _ = batch_of([6, 5], [2, 2], 6)
        torch.testing.assert_close(merged.hidden(ids, mask), model.hidden(ids, mask), rtol=1e-4, atol=1e-5)


def test_exported_folders_load_with_plain_transformers_and_peft(any_model_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = trained_adapter(any_model_folder)
    adapters.export_merged(model.model, tmp_path / "merged")
    adapters.save_adapter(model.model, tmp_path / "adapter", base=str(any_model_folder))
    ids, _, _ = batch_of([6, 6], [2, 2], 6)
    with torch.no_grad():
        expected = model.model(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(any_model_folder)
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)


def test_adapter_survives_saving_bit_for_bit_and_refuses_another_shape(any_model_folder, tmp_path):
    model = trained_adapter(any_model_folder)
    adapters.save_adapter(model.model, tmp_path / "adapter", base="base")
    fresh = models.load_causal_lm(str(any_model_folder))
    adapters.attach_lora(fresh.model, r=4, alpha=8, seed=99)
    adapters.load_adapter(fresh.model, tmp_path / "adapter")
    for ours, theirs in zip(model.model.parameters(), fresh.model.parameters(), strict=True):
        assert not ours.requires_grad or torch.equal(ours, theirs)
    other = models.load_causal_lm(str(any_model_folder))
    adapters.attach_lora(other.model, r=4, alpha=8, last_layers=1, seed=99)
    with pytest.raises(ValueError, match="expected"):
        adapters.load_adapter(other.model, tmp_path / "adapter")


def test_last_layers_adapts_the_top_only(any_model_folder):
    model = trained_adapter(any_model_folder, last_layers=1)
    names = [name for name, p in model.model.named_parameters() if p.requires_grad]
    assert names
    assert all(".1." in name for name in names)
