"""What a supervised config refuses, what a zoo of methods unfolds to, and how answers are graded."""

from __future__ import annotations

import pytest

from alignment.config import SftRunConfig
from alignment.config.zoo import PeftZooConfig
from alignment.config_io import load_config
from alignment.loops.quiz import Question, Quiz, quiz_report
from alignment.model_card import write_model_card
from alignment.types import Prompt


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--training.patience", "2"], r"training\.patience: got 2 with training\.validate_every=0, expected"),
        (
            ["--training.validate_every", "2", "--data.held_out", "0"],
            r"got 2 with data\.held_out=0, expected examples",
        ),
        (["--model.dtype", "float16"], r"model\.dtype: got float16, expected float32 or bfloat16"),
        (["--training.max_tokens_per_micro_batch", "100"], r"got 100, expected at least the 512 of the longest"),
        (["--training.optimizer.adaptive_kl_target", "0.1"], r"adaptive_kl_target: got 0\.1, expected null"),
        (
            ["--training.neftune_alpha", "5", "--training.adapter.type", "prompt"],
            r"training\.neftune_alpha: got 5 with adapter\.type=prompt, expected",
        ),
        (["--training.adapter.type", "dora"], r"adapter\.r: got 0 with adapter\.type=dora, expected a rank above 0"),
        (["--training.adapter.type", "lorra"], r'training\.adapter\.type: got "lorra"'),
        (["--training.batch_size", "0"], r"training\.batch_size: got 0"),
        (["--training.neftune_alpha", "-1"], r"training\.neftune_alpha: got -1"),
        (["--training.epochs", "3"], r"training\.epochs"),
    ],
)
def test_impossible_settings_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        load_config(SftRunConfig, overrides=flags)


ZOO = {
    "run": {"num_steps": 3},
    "training": {"batch_size": 4, "optimizer": {"lr": 1e-3, "decay": "constant"}, "adapter": {"r": 8}},
    "zoo": {
        "full": {"adapter": {"r": 0}, "optimizer": {"lr": 1e-5}},
        "ia3": {"adapter": {"type": "ia3"}},
        "wide": {"adapter": {"r": 64}, "batch_size": 2},
    },
}


def test_a_method_changes_only_what_it_names():
    zoo = PeftZooConfig.model_validate(ZOO)
    full, ia3, wide = (zoo.of(name) for name in zoo.zoo)
    assert (full.training.adapter.r, full.training.optimizer.lr, full.training.optimizer.decay) == (
        0,
        1e-5,
        "constant",
    )
    assert (ia3.training.adapter.type, ia3.training.optimizer.lr, ia3.training.batch_size) == ("ia3", 1e-3, 4)
    assert (wide.training.adapter.r, wide.training.batch_size, wide.run.num_steps) == (64, 2, 3)
    assert type(full) is SftRunConfig


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"a": {"adapter": {"type": "dora", "r": 0}}}, r"zoo\.a.*adapter\.r: got 0"),
        ({"a": {"adaptor": {}}}, r"zoo\.a\.adaptor: got an unknown key, expected those of the section"),
        ({"a": {"batch_size": 0}}, r"zoo\.a\.batch_size: got 0, expected another value"),
        ({"../a": {}}, r"zoo: got the name '\.\./a', expected"),
        ({"zoo.md": {}}, r"zoo: got the name 'zoo\.md', expected"),
        ({"a|b": {}}, r"zoo: got the name 'a\|b', expected"),
        ({}, "zoo"),
    ],
)
def test_a_zoo_with_an_impossible_method_is_refused_as_a_whole(entry, words):
    with pytest.raises(ValueError, match=words):
        PeftZooConfig.model_validate({**ZOO, "zoo": entry})


def test_an_answer_is_right_when_nothing_but_the_answer_is_said():
    prompt = Prompt(id="1", messages=({"role": "user", "content": "?"},), prompt_ids=(1,))
    right = ["心内科", " 心内科。", "心内科\n", "ＡＢＣ"]
    wrong = ["心内", "心内科或者外科", ""]
    questions = [Question(prompt=prompt, answer="心内科")] * 3 + [Question(prompt=prompt, answer="abc")]
    assert quiz_report(Quiz(questions=questions), right)["correct"] == [1.0] * 4
    report = quiz_report(Quiz(questions=questions[:3]), wrong)
    assert (report["accuracy"], report["n"]) == (0.0, 3)
    # Wilson's upper end for 0 of 3: z^2 / (n + z^2).
    assert report["accuracy_ci95"][1] == pytest.approx(3.841459 / 6.841459, rel=1e-6)


def test_a_card_is_what_hubs_read(tmp_path):
    import yaml

    row = {"before": 2.0, "after": 1.5, "gain_ci95": [-0.6, -0.4], "n": 7, "higher_is_better": False}
    write_model_card(
        tmp_path,
        recipe="sft_medical",
        base='odd "name"',
        config="run: {seed: 1}",
        data="9 train",
        inputs={"examples": "ab" * 32},
        figures={"loss": row},
        step=4,
    )
    text = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == 'odd "name"'
    assert "| loss | 2.0000 | 1.5000 | -0.6000 .. -0.4000 | 7 | lower |" in text
    assert yaml.safe_load(text.split("```yaml")[1].split("```")[0]) == {"run": {"seed": 1}}
