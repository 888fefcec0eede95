"""YAML and dotted overrides -> config, and back."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.config import ClusterConfig, PpoRunConfig, RewardModelRunConfig
from alignment.config_io import describe, diff_configs, dump_config, load_config, read_yaml

REWARD = ["--reward.functions", "[{name: text:finished_sentence}]"]


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*words: str, cls=PpoRunConfig, file: Path | None = None) -> str:
    with pytest.raises(ValueError) as error:
        load_config(cls, file=file, overrides=list(words))
    assert type(error.value) is ValueError
    return str(error.value)


def test_later_layers_win(tmp_path):
    file = write(tmp_path, "run: {seed: 5, num_steps: 20}\nppo: {gamma: 0.9}")
    config = load_config(PpoRunConfig, file=file, overrides=[*REWARD, "--run.seed=7", "--ppo.gae_lambda", "0.5"])
    assert (config.run.seed, config.run.num_steps, config.run.keep_checkpoints) == (7, 20, 2)
    assert (config.ppo.gamma, config.ppo.gae_lambda) == (0.9, 0.5)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "{}"])
def test_empty_file_leaves_the_defaults(tmp_path, text):
    assert load_config(ClusterConfig, file=write(tmp_path, text)) == ClusterConfig()


def test_a_key_keeps_the_other_defaults_of_its_section():
    config = load_config(PpoRunConfig, overrides=[*REWARD, "--critic.optimizer.betas", "[0.8, 0.9]"])
    assert config.critic.optimizer.lr == 2e-5
    assert config.critic.optimizer.betas == (0.8, 0.9)
    assert config.policy.optimizer.lr == 1e-5


def test_a_source_replaces_the_one_below(tmp_path):
    limited = load_config(PpoRunConfig, overrides=[*REWARD, "--data.source.limit", "3"])
    assert (limited.data.source.asset, limited.data.source.limit) == ("healthsearchqa", 3)
    file = write(tmp_path, "data: {source: {hub: some/name, limit: 4}}")
    hub = load_config(PpoRunConfig, file=file, overrides=REWARD).data.source
    assert (hub.asset, hub.hub, hub.limit) == (None, "some/name", 4)
    local = load_config(PpoRunConfig, file=file, overrides=[*REWARD, "--data.source.path", "*.jsonl"]).data.source
    assert (local.asset, local.hub, local.path, local.limit) == (None, None, "*.jsonl", 4)
    assert "exactly one" in refusal(*REWARD, "--data.source.path=a", "--data.source.hub=b")


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--kl.target", "null"], "kl.target", None),
        (["--kl.target", "1e-3"], "kl.target", 1e-3),
        (["--kl.target", "6"], "kl.target", 6.0),
        (["--run.show_text", "true"], "run.show_text", True),
        (["--run.trackers", "[]"], "run.trackers", ()),
        (["--rollout.stop", "[</s>, '###']"], "rollout.stop", ("</s>", "###")),
        (["--policy.adapter.target_modules", "[q_proj]"], "policy.adapter.target_modules", ("q_proj",)),
        (["--model.revision", "12345e7"], "model.revision", "12345e7"),
        (["--model.revision", "null"], "model.revision", None),
        (["--data.system_prompt", "You are: a doctor"], "data.system_prompt", "You are: a doctor"),
        (["--data.system_prompt=no"], "data.system_prompt", "no"),
        (["--data.system_prompt=a=b"], "data.system_prompt", "a=b"),
        (["--reward.functions", "[{name: a, weight: -1}]"], "reward.functions.0.weight", -1.0),
        (["--run.seed", "1", "--run.seed", "2"], "run.seed", 2),
    ],
)
def test_override_values(words, key, value):
    found: Any = load_config(PpoRunConfig, overrides=[*REWARD, *words])
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    assert read_yaml(write(tmp_path, "a: 1e-5\nb: -2E+3\nc: .5e1\nd: 1e5x\ne: 2024-01-31")) == {
        "a": 1e-5,
        "b": -2000.0,
        "c": 5.0,
        "d": "1e5x",
        "e": "2024-01-31",
    }


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("--ppo.gama", "ppo.gamma"),
        ("--gamma", "ppo.gamma"),
        ("--ppo.zzzzzz", None),
        ("--policy.optimiser", "policy.optimizer"),
        ("--polcy", "policy"),
        ("--zzzzzz", None),
    ],
)
def test_unknown_key_names_the_nearest(word, nearest):
    message = refusal(*REWARD, word, "0.5")
    assert message.splitlines()[1].startswith(f"{word[2:]}: got an unknown key")
    assert ("did you mean" in message) == (nearest is not None)
    if nearest:
        assert f"did you mean {nearest}" in message


def test_unknown_section_is_one_problem():
    message = refusal(*REWARD, "--polcy.optimizer.lr", "1", "--polcy.optimizer.eps", "1")
    assert message.splitlines()[1:] == [
        "polcy: got an unknown key, expected one of this config's; did you mean policy?"
    ]


def test_unknown_key_inside_a_list():
    assert "reward.functions.0.nam: got an unknown key" in refusal("--reward.functions", "[{nam: a}]")


def test_every_problem_has_its_line():
    message = refusal(
        "--run.seed=-1", "--policy.optimizer.lr=.nan", "--ppo.clip_ratio=2", "--model.dtype=int8", "--ppo.gama=1"
    )
    assert message.splitlines()[1:] == [
        "run.seed: got -1, expected integer >= 0 and < 9.22337e+18; correct it",
        'model.dtype: got "int8", expected auto|float32|bfloat16|float16; correct it',
        "policy.optimizer.lr: got NaN, expected finite number > 0; correct it",
        "reward: got nothing, expected a value; set it",
        "ppo.clip_ratio: got 2, expected number > 0 and < 1; correct it",
        "ppo.gama: got an unknown key, expected one of this config's; did you mean ppo.gamma?",
    ]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--run.num_steps", "true"], "run.num_steps: got true, expected integer > 0"),
        (["--run.num_steps", "1.5"], "run.num_steps: got 1.5, expected integer > 0"),
        (["--run.num_steps", "'3'"], 'run.num_steps: got "3", expected integer > 0'),
        (["--ppo.gamma", ".inf"], "ppo.gamma: got Infinity, expected number >= 0 and <= 1"),
        (["--kl.target", "0"], "kl.target: got 0, expected number > 0 or null"),
        (["--ppo", "3"], "ppo: got 3, expected a section"),
        (["--ppo.minibatch_size", "7"], "ppo.minibatch_size: got 7, expected a divisor of the 16"),
        (["--rollout.top_p", "0.9"], "rollout: got top_p=0.9"),
        (["--run.trackers", "[foo]"], "run.trackers.0: got \"foo\", expected 'tensorboard', 'wandb' or 'mlflow'"),
        (["--policy.optimizer.betas", "[0.9]"], "policy.optimizer.betas.1: got nothing"),
    ],
)
def test_out_of_range_values(words, part):
    assert part in refusal(*REWARD, *words)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--run.seed"], "run.seed: got no value"),
        (["--run.seed", "--run.num_steps", "3"], "run.seed: got no value"),
        (["--run.sead"], "nearest: run.seed"),
        (["run.seed", "3"], "got 'run.seed', expected --section.key value"),
        (["--", "3"], "got '--'"),
        (["--run.seed", "1", "--run.seed.x", "1"], "as a value and as a section"),
        (["--data.prompt_key", "\udc80"], "not Unicode"),
    ],
)
def test_words_that_are_no_override(words, part):
    assert part in refusal(*REWARD, *words)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ppo:\n  gamma: 1\n  gamma: 0.5\n", "line 3: got key 'gamma' twice"),
        ("ppo: {}\nppo: {}\n", "line 2: got key 'ppo' twice"),
        ("run: !!python/object/apply:os.system [touch canary]\n", "python/object/apply:os.system"),
        ("run: !!python/name:os.system\n", "python/name:os.system"),
        ("run: !!set {a, b}\n", "tag:yaml.org,2002:set"),
        ("1: 2\n", "line 1: got a key that is not text"),
        ("? [a]\n: 2\n", "line 1: got a key that is not text"),
        ("- 1\n", "got a list"),
        ("ppo: [\n", "line 2: got "),
        ("ppo: {}\0", "#x0000"),
        ("model: {revision: 123}", "model.revision: got 123, expected text or null; quote it"),
        ("ppo:\n", "ppo: got null, expected a section"),
    ],
)
def test_bad_files(tmp_path, monkeypatch, text, part):
    monkeypatch.chdir(tmp_path)
    message = refusal(*REWARD, file=write(tmp_path, text))
    assert part in message
    assert "config.yaml" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_missing_file_and_wrong_encoding(tmp_path):
    assert "got no such file" in refusal(file=tmp_path / "none.yaml")
    assert "got no such file" in refusal(file=tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: {path: café}".encode("latin-1"))
    assert "not UTF-8" in refusal(file=tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (
            PpoRunConfig,
            [*REWARD, "--model.revision", "12345e7", "--data.system_prompt", "été: «non»\n# x", "--kl.target=6"],
        ),
        (
            PpoRunConfig,
            [*REWARD, "--data.source.path", "null", "--data.source.hub", "1:30", "--model.path", "2024-01-31"],
        ),
        (RewardModelRunConfig, ["--training.optimizer.lr", "3e-7", "--run.trackers", "[]"]),
        (ClusterConfig, ["--colocate", "[[policy, reference, rollout]]", "--policy.gpus_per_worker", "0.5"]),
    ],
)
def test_dump_reads_back_equal(tmp_path, cls, words):
    config = load_config(cls, overrides=words)
    assert load_config(cls, file=write(tmp_path, dump_config(config))) == config
    assert diff_configs(read_yaml(tmp_path / "config.yaml"), config.model_dump(mode="json")) == []
    assert diff_configs(read_yaml(tmp_path / "config.yaml"), config.model_dump()) == []
    assert set(yaml.safe_load(dump_config(config))) == set(cls.model_fields)


def test_describe_lists_every_key_with_type_default_and_meaning():
    text = describe(PpoRunConfig)
    lines = text.splitlines()
    keys = [line.split()[0] for line in lines if line.startswith("  --")]
    dumped = load_config(PpoRunConfig, overrides=REWARD).model_dump()

    def leaves(data, prefix="--"):
        for name, value in data.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    assert keys == list(leaves(dumped))
    assert "  --ppo.clip_ratio number > 0 and < 1 (default 0.2)" in lines
    assert "  --critic.optimizer.lr number > 0 (default 2e-05)" in lines
    assert "  --data.source.asset text or null (default healthsearchqa)" in lines
    assert "  --kl.estimator k1|k2|k3 (default k1)" in lines
    called = "name, part, settings, time_limit, samples_per_call"
    assert f"  --reward.functions list of {{{called}, weight, clip, normalize, gate}}" in lines
    assert f"  --reward.gold list of {{{called}}} (default [])" in lines
    assert lines[lines.index("  --ppo.gamma number >= 0 and <= 1 (default 1.0)") + 1] == "      Discount."
    assert max(map(len, lines)) <= 119


def test_diff_names_what_changed():
    old = {"run": {"seed": 1, "gone": True}, "ppo": {"gamma": 1.0}, "stop": ("a",)}
    new = {"run": {"seed": 2}, "ppo": {"gamma": 1.0, "fresh": None}, "stop": ["a"]}
    assert diff_configs(old, new) == ["run.seed: 1 -> 2", "run.gone: True -> absent", "ppo.fresh: absent -> None"]
