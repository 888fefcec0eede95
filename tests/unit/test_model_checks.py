"""What is refused of a model before any weight is read: files cut short, other shapes, no head, too few positions."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_config, write_tiny_model, write_tiny_reward_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from actors.build import ppo_actors
from alignment.config import AdapterConfig, ClusterConfig, ModelConfig, PpoRunConfig
from alignment.config_io import load_config
from alignment.data.chat import load_tokenizer
from alignment.data.model_assets import weight_shapes
from alignment.model_checks import _check_single, check_model
from alignment.models import load_scalar_model
from recipes.checks import check_models, resolve_paths

KEYS = {"policy": "--model.path", "critic": "--critic.path", "reward": "--reward.model"}


def config_of(tiny: Path, *words: str) -> PpoRunConfig:
    given = ["--model.path", str(tiny / "policy"), "--reward.model", str(tiny / "reward")]
    return load_config(PpoRunConfig, overrides=[*given, *words])


def checked(config: PpoRunConfig) -> int:
    config = resolve_paths(config)
    return check_models(config, load_tokenizer(config.model.path))


def refusal(config: PpoRunConfig) -> str:
    with pytest.raises(ValueError, match=r"(?s)got .*expected .*; ") as error:
        checked(config)
    return str(error.value)


def edited(source: Path, target: Path, **values: object) -> Path:
    """A copy of a model folder with other values in its config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | values))
    return target


def test_models_that_fit_are_counted(tiny):
    # Untied: 259 x 32 twice, two layers of 32 x (32 + 16 + 16 + 32) + 3 x 32 x 64 + 2 x 32, and a norm of 32.
    assert checked(config_of(tiny)) == 2 * 259 * 32 + 2 * (32 * 96 + 3 * 32 * 64 + 64) + 32
    lora = ["--policy.adapter.r", "4", "--policy.adapter.target_modules", "[q_proj, down_proj]"]
    assert checked(config_of(tiny, *lora, "--rollout.stop", "[a, <|endoftext|>]")) > 0


@pytest.mark.parametrize("stop", ["ab", "\\n\\n", ""])
def test_a_stop_of_other_than_one_token(tiny, stop):
    assert "rollout.stop: got" in refusal(config_of(tiny, "--rollout.stop", json.dumps([stop])))


@pytest.mark.parametrize("role", ["policy", "critic"])
@pytest.mark.parametrize("names", ["[query]", "[q_proj, v_porj]", "[score]", "[]"])
def test_adapter_names_without_a_layer(tiny, role, names):
    words = [f"--{role}.adapter.r", "4", f"--{role}.adapter.target_modules", names]
    text = refusal(config_of(tiny, *words))
    assert text.startswith(f"{role}: adapter.target_modules: got ")
    assert "'v_proj'" in text
    assert checked(config_of(tiny, *words[2:])) > 0, "full fine-tuning reads no names"


def test_a_critic_is_resolved_and_its_vocabulary_checked(tiny, tmp_path):
    small = edited(tiny / "policy", tmp_path / "small", vocab_size=100)
    assert refusal(config_of(tiny, "--critic.path", str(small))).startswith(
        "critic: tokenizer: got token ids up to 258"
    )
    assert "missing" in refusal(config_of(tiny, "--critic.path", str(tmp_path / "missing")))
    assert "asset:nothing" in refusal(config_of(tiny, "--critic.path", "asset:nothing"))


def test_an_architecture_without_a_scalar_head(tiny, tmp_path):
    other = edited(tiny / "policy", tmp_path / "mamba", model_type="mamba", architectures=["MambaForCausalLM"])
    text = refusal(config_of(tiny, "--critic.path", str(other)))
    assert "critic: got" in text
    assert "cannot be built with a scalar head" in text


def test_reward_models_that_cannot_score(tiny, tmp_path):
    assert "SequenceClassification" in json.loads((tiny / "reward" / "config.json").read_text())["architectures"][0]
    no_weights = edited(tiny / "reward", tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    assert "without model.safetensors" in refusal(config_of(tiny, "--reward.model", str(no_weights)))
    broken = edited(tiny / "reward", tmp_path / "broken")
    (broken / "config.json").write_text("{")
    assert f"{broken}/config.json: got JSON that is broken" in refusal(config_of(tiny, "--reward.model", str(broken)))
    small = edited(tiny / "reward", tmp_path / "small", vocab_size=100)
    assert "reward: tokenizer: got token ids" in refusal(config_of(tiny, "--reward.model", str(small)))
    mute = edited(tiny / "reward", tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    (mute / "tokenizer_config.json").unlink()
    assert "mute': got none that could be loaded" in refusal(config_of(tiny, "--reward.model", str(mute)))


def test_every_actor_gets_resolved_paths_and_its_own_revision(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tiny_model(tmp_path / "critic")
    write_tiny_reward_model(tmp_path / "judge")
    words = ["--model.revision", "abc", "--critic.path", "~/critic", "--reward.model", "~/judge"]
    config = resolve_paths(config_of(tiny, *words, "--reward.revision", "def"))
    critic_path = config.critic.path
    assert critic_path == str(tmp_path / "critic")
    actors = ppo_actors(config, ClusterConfig(), model_path=config.model.path, critic_path=critic_path)
    assert actors["critic"].model_config.revision is None
    assert (actors["reward_model"].config.model, actors["reward_model"].config.revision) == (
        str(tmp_path / "judge"),
        "def",
    )
    assert {actors[role].model_config.revision for role in ("policy", "reference", "rollout")} == {"abc"}
    follower = resolve_paths(config_of(tiny, "--model.revision", "abc"))
    actors = ppo_actors(follower, ClusterConfig(), model_path=follower.model.path, critic_path=follower.model.path)
    assert actors["critic"].model_config.revision == "abc"


def test_a_scalar_model_is_checked_for_reward_training_too(tiny):
    model = ModelConfig(path=str(tiny / "policy"))
    tokenizer = load_tokenizer(model.path)
    # The head of 32 weights takes the place of the 259 x 32 of the language model's.
    scalar = check_model("policy", model, tokenizer) - 259 * 32 + 32
    assert check_model("training", model, tokenizer, AdapterConfig(r=2), head="random") == scalar
    with pytest.raises(ValueError, match=r"training: adapter\.target_modules"):
        check_model("training", model, tokenizer, AdapterConfig(r=2, target_modules=("nope",)), head="random")


def test_an_adapter_that_could_not_be_attached_is_refused_without_weights(tiny, tmp_path):
    tokenizer = load_tokenizer(str(tiny / "policy"))
    model = ModelConfig(path=str(tiny / "policy"))

    def refusal_of(config: ModelConfig, **adapter: object) -> str:
        with pytest.raises(ValueError) as error:
            check_model("training", config, tokenizer, AdapterConfig(**adapter))
        return str(error.value)

    assert refusal_of(model, r=2, last_layers=3).startswith("training: adapter.last_layers: got 3, expected at most ")
    assert "adapter.r: got 33 with adapter.type=pissa, expected at most 16" in refusal_of(model, type="pissa", r=33)
    assert check_model("training", model, tokenizer, AdapterConfig(type="pissa", r=16))
    other = edited(tiny / "policy", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].flatten().unsqueeze(1)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    adapter = AdapterConfig(r=2)
    with pytest.raises(ValueError, match=r"calibration_examples: got .*do not have model.layers.0.mlp.up_proj under"):
        _check_single(other, {"model.layers.0.mlp.up_proj": torch.empty(64, 32)})
    assert check_model("training", model, tokenizer, adapter, read_singly=True)
    # Of OPT the feed-forward has no module of its own, of MPT keys and values stand in a matrix of an unknown name.
    loose = OPTConfig(vocab_size=259, hidden_size=8, word_embed_proj_dim=8, num_hidden_layers=1, num_attention_heads=2)
    OPTForCausalLM(loose).save_pretrained(tmp_path / "opt")
    parts = refusal_of(ModelConfig(path=str(tmp_path / "opt")), type="bottleneck", r=2)
    assert "adapter.type: got bottleneck with a model whose layer 0 has the parts ['self_attn', 'fc1', 'fc2']" in parts
    MptForCausalLM(MptConfig(vocab_size=259, d_model=8, n_layers=1, n_heads=2)).save_pretrained(tmp_path / "mpt")
    names = refusal_of(ModelConfig(path=str(tmp_path / "mpt")), type="ia3")
    assert "adapter.type: got ia3 with a model whose layers are named ['Wqkv', 'down_proj'," in names


def copied(tiny: Path, role: str, target: Path) -> Path:
    shutil.copytree(tiny / ("reward" if role == "reward" else "policy"), target)
    return target


def without(folder: Path, *names: str) -> Path:
    weights = load_file(folder / "model.safetensors")
    for name in names:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("role", KEYS)
@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_weights_that_are_cut_short(tiny, tmp_path, role, kept):
    folder = copied(tiny, role, tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    text = refusal(config_of(tiny, KEYS[role], str(folder)))
    assert f"got {file}, which is no whole safetensors file" in text
    assert "copy or download it again" in text


def test_a_pointer_in_place_of_weights(tiny, tmp_path):
    folder = copied(tiny, "policy", tmp_path / "pointer")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(config_of(tiny, "--model.path", str(folder)))


@pytest.mark.parametrize("role", KEYS)
def test_weights_of_other_shapes_than_the_config_says(tiny, tmp_path, role):
    source = tiny / ("reward" if role == "reward" else "policy")
    folder = edited(source, tmp_path / "wide", vocab_size=300)
    text = refusal(config_of(tiny, KEYS[role], str(folder)))
    assert text.startswith(f"{role}: got {folder} with ")
    assert "model.embed_tokens.weight of shape [259, 32] for [300, 32]" in text


@pytest.mark.parametrize("role", KEYS)
def test_weights_that_are_not_there(tiny, tmp_path, role):
    folder = without(copied(tiny, role, tmp_path / "holes"), "model.layers.1.mlp.up_proj.weight", "model.norm.weight")
    text = refusal(config_of(tiny, KEYS[role], str(folder)))
    assert f"{role}: got {folder} without model.layers.1.mlp.up_proj.weight, model.norm.weight, expected" in text


def test_a_reward_model_without_its_head(tiny, tmp_path):
    folder = without(copied(tiny, "reward", tmp_path / "headless"), "score.weight")
    text = refusal(config_of(tiny, "--reward.model", str(folder)))
    assert f"reward: got {folder} without score.weight, expected a reward model with a trained head" in text
    assert checked(config_of(tiny, "--critic.path", str(folder))) > 0, "a critic's head starts anew"
    with pytest.raises(ValueError, match=r"score\.weight"):
        load_scalar_model(str(folder))


def test_a_language_model_without_its_head(tiny):
    text = refusal(config_of(tiny, "--model.path", str(tiny / "reward")))
    assert "policy: got" in text
    assert "without lm_head.weight, expected the weights of the LlamaForCausalLM" in text


def test_a_head_of_another_name(tiny, tmp_path):
    """An encoder's `classifier` reads a pooled state: nothing here could score with it."""
    from transformers import BertConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=259, num_labels=1, **sizes))
    model.save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    text = refusal(config_of(tiny, "--reward.model", str(tmp_path / "bert")))
    assert "(BertForSequenceClassification), whose head is no linear layer `score`" in text


def test_every_family_passes_as_language_model_and_as_new_scalar_model(any_model_folder):
    model, tokenizer = ModelConfig(path=str(any_model_folder)), load_tokenizer(str(any_model_folder))
    num_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(any_model_folder).parameters())
    assert check_model("policy", model, tokenizer) == num_parameters
    for head in ("zeros", "random"):
        assert check_model("critic", model, tokenizer, head=head) > 0
    with pytest.raises(ValueError, match=r"got architectures \["):
        check_model("reward", model, tokenizer, head="require")


def test_tied_weights_and_names_without_the_prefix_are_no_holes(tmp_path):
    """As GPT-2 stands on the hub: no lm_head, and `h.0` for `transformer.h.0`."""
    folder = write_tiny_model(tmp_path / "gpt2", "gpt2")
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    assert "h.0.attn.c_attn.weight" in bare
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = load_tokenizer(str(folder))
    assert check_model("policy", ModelConfig(path=str(folder)), tokenizer) > 0
    assert check_model("critic", ModelConfig(path=str(folder)), tokenizer, head="zeros") > 0


def test_experts_that_are_merged_while_loading(tmp_path):
    from transformers import MixtralConfig

    values = tiny_config("mistral", 259).to_dict() | {"num_local_experts": 4, "model_type": "mixtral"}
    AutoModelForCausalLM.from_config(MixtralConfig(**values)).save_pretrained(tmp_path / "moe")
    byte_tokenizer().save_pretrained(tmp_path / "moe")
    model, tokenizer = ModelConfig(path=str(tmp_path / "moe")), load_tokenizer(str(tmp_path / "moe"))
    assert check_model("policy", model, tokenizer) > 0
    edited(tmp_path / "moe", tmp_path / "other", intermediate_size=48)
    with pytest.raises(ValueError, match=r"policy: got .*other with .* expected the weights of the Mixtral"):
        check_model("policy", ModelConfig(path=str(tmp_path / "other")), tokenizer)


def test_shards(tiny, tmp_path):
    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny / "policy").save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert weight_shapes(folder) == weight_shapes(tiny / "policy")
    assert checked(config_of(tiny, "--model.path", str(folder))) > 0
    whole = shards[1].read_bytes()
    names = list(load_file(shards[1]))
    save_file({"another": torch.zeros(1)}, shards[1])
    assert f"without {sorted(names)[0]}" in refusal(config_of(tiny, "--model.path", str(folder)))
    shards[1].write_bytes(whole[:-1])
    assert f"got {shards[1]}, which is no whole" in refusal(config_of(tiny, "--model.path", str(folder)))


def test_no_weight_is_read(tmp_path):
    """Eight gigabytes of weights in a file with a hole: read or held in memory, they would show."""
    rows, width = 2**26, 32
    folder = write_tiny_model(tmp_path / "huge")
    weights = load_file(folder / "model.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in weights.items() if name != "lm_head.weight"}
    shapes["model.embed_tokens.weight"] = [rows, width]
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows, "tie_word_embeddings": True}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_parameters = check_model("policy", ModelConfig(path=str(folder)), load_tokenizer(str(folder)))
    assert num_parameters > rows * width
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "kilobytes"


@pytest.mark.parametrize("role", KEYS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_sequences_beyond_the_models_positions(tiny, tmp_path, role, kind):
    folder = tmp_path / "short"
    config = tiny_config(kind, 259)
    config.max_position_embeddings, config.num_labels, config.pad_token_id = 64, 1, 2
    auto = AutoModelForSequenceClassification if role == "reward" else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    fits = 63 if role == "reward" else 64
    words = [KEYS[role], str(folder), "--data.max_prompt_tokens", "40", "--rollout.max_new_tokens"]
    assert checked(config_of(tiny, *words, str(fits - 40))) > 0
    text = refusal(config_of(tiny, *words, str(fits - 39)))
    assert f"{role}: got sequences of up to 65 tokens (data.max_prompt_tokens 40 + rollout.max_new_tokens" in text
    assert f"expected at most the 64 positions of '{folder}'" in text
    assert ("its end token 1" in text) == (role == "reward")


def test_pairs_beyond_the_models_positions(tiny):
    model, tokenizer = ModelConfig(path=str(tiny / "policy")), load_tokenizer(str(tiny / "policy"))
    check_model("training", model, tokenizer, head="random", lengths={"data.max_tokens": 512})
    with pytest.raises(
        ValueError, match=r"training: got .* 513 tokens \(data\.max_tokens 513\), expected at most the"
    ):
        check_model("training", model, tokenizer, head="random", lengths={"data.max_tokens": 513})


def test_a_model_without_a_limit_takes_any_length(tmp_path):
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=259, hidden_size=32, n_layer=1, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "alibi")
    byte_tokenizer().save_pretrained(tmp_path / "alibi")
    model, tokenizer = ModelConfig(path=str(tmp_path / "alibi")), load_tokenizer(str(tmp_path / "alibi"))
    assert check_model("policy", model, tokenizer, AdapterConfig(), lengths={"data.max_prompt_tokens": 10**6}) > 0


@pytest.mark.parametrize("values", [{"pad_token_id": 300}, {"hidden_act": "nothing"}])
def test_a_config_that_no_model_can_be_built_from(tiny, tmp_path, values):
    folder = edited(tiny / "policy", tmp_path / "odd", **values)
    assert "which cannot be built with a language-model head" in refusal(config_of(tiny, "--model.path", str(folder)))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "got a broken file (JSONDecodeError"),
        ("[]", "got a broken file (TypeError"),
        ('{"mean": 1.0}', "got a broken file (KeyError: 'std')"),
        ('{"mean": 1.0, "std": 0.0}', "got mean 1 and std 0, expected finite numbers and a std above 0"),
        ('{"mean": 1.0, "std": -1.0}', "and std -1,"),
        ('{"mean": NaN, "std": 1.0}', "got mean nan"),
        ('{"mean": 1.0, "std": Infinity}', "and std inf,"),
    ],
)
def test_scores_that_cannot_be_standardised(tiny, tmp_path, text, part):
    folder = write_tiny_reward_model(tmp_path / "judge")
    (folder / "score_statistics.json").write_text(text)
    told = refusal(config_of(tiny, "--reward.model", str(folder)))
    assert f"{folder}/score_statistics.json: " in told
    assert part in told
    assert checked(config_of(tiny, "--reward.model", str(folder), "--reward.standardize_model", "false")) > 0
