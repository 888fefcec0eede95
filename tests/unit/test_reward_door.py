"""What a reward's settings and the rows that it scores may be: refused at the door, before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import certifi
import pytest
from tiny import byte_tokenizer

from alignment.config import PpoRunConfig, PromptDataConfig, RewardConfig
from alignment.config_io import load_config
from alignment.data.prompts import load_prompts
from alignment.types import Prompt
from recipes.checks import check_reward_functions
from rewards.base import load_function
from rewards.transport import JsonClient

NAN, INF = float("nan"), float("inf")


def refusal(name: str, settings: dict[str, object], prompts: list[Prompt] | None = None, **reward: object) -> str:
    config = RewardConfig.model_validate(
        {"functions": [{"name": name, "settings": settings, "time_limit": 6000}], **reward}
    )
    with pytest.raises(ValueError) as refused:
        check_reward_functions(config, prompts or [])
    return str(refused.value)


@pytest.mark.parametrize(("given", "got"), [("[5]", "[5]"), ("null", "null"), ("hello", '"hello"')])
def test_settings_that_are_no_mapping(given, got):
    functions = f'[{{name: "text:finished_sentence", settings: {given}}}]'
    with pytest.raises(ValueError, match=re.escape(f"0.settings: got {got}, expected {{name: value}}; correct it")):
        load_config(PpoRunConfig, file=None, overrides=["--reward.functions", functions])


REMOTE = {"url": "http://127.0.0.1:1/score"}
JUDGE = {"url": "http://127.0.0.1:1/v1", "model": "m", "rubric": "r"}


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("remote:score", {**REMOTE, "timeout": NAN}, "got timeout: nan as a setting of remote:score, expected finite"),
        ("sandbox:passes_tests", {"time_limit": NAN}, "got time_limit: nan"),
        ("numbers:final_number", {"relative_tolerance": INF}, "got relative_tolerance: inf"),
        ("numbers:near_number", {"reach": 10**400}, "got reach: 1000"),
        ("calculators:calculated", {"partial": NAN}, "got partial: nan"),
        ("judge:rating", {**JUDGE, "extra": {"top": [{"p": NAN}]}}, "got extra: {'top': [{'p': nan}]}"),
        (
            "judge:rating",
            {**JUDGE, "extra": {"model": "x", "messages": []}},
            "got extra with messages, model, expected",
        ),
        ("judge:rating", {**JUDGE, "extra": {"n": 2}}, "got extra with n, expected none of max_tokens, messages"),
        ("judge:rating", {**JUDGE, "cache": "/proc/nope"}, "judge.cache: got '/proc/nope'"),
        (
            "text:length_between",
            {"min_words": 50, "max_words": 10},
            "length_between: got min_words 50 and max_words 10",
        ),
        ("text:length_between", {"min_words": -1}, "got min_words -1 and max_words 60, expected 0 <= min_words"),
        ("text:length_between", {"min_words": 0, "max_words": 0}, "max_words of 1 or more; correct them"),
        ("form:tagged_sections", {"tags": []}, "form:tagged_sections: got tags [], expected one or more names"),
        ("form:tagged_sections", {"tags": ["a", "a"]}, "got tags ['a', 'a'], expected one or more names, each once"),
        ("form:in_language", {"default_language": "fr"}, "got default_language 'fr', expected one of zh, en"),
        ("calculators:calculated", {"partial": 7}, "calculators:calculated: got partial 7, expected a share"),
        ("calculators:calculated", {"relative_tolerance": -1}, "got relative_tolerance -1, expected 0 or more; raise"),
        ("numbers:final_number", {"relative_tolerance": -1}, "numbers:final_number: got relative_tolerance -1"),
        ("numbers:near_number", {"reach": 0}, "numbers:near_number: reach: got 0, expected a number above 0"),
        (
            "numbers:final_number",
            {"unit": "mg"},
            "got unit: 'mg' as a setting of numbers:final_number, expected a col",
        ),
    ],
)
def test_settings_that_cannot_be(name, settings, said):
    text = refusal(name, settings)
    assert said in text
    assert text.startswith("reward.functions: ")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("text:length_between", {"min_words": 0, "max_words": 1}),
        ("form:in_language", {"default_language": "zh-CN"}),
        ("calculators:calculated", {"partial": 1, "relative_tolerance": 0}),
        ("judge:rating", {**JUDGE, "extra": {"chat_template_kwargs": {"enable_thinking": False}}}),
    ],
)
def test_settings_that_can(name, settings):
    functions = [{"name": name, "settings": settings, "time_limit": 6000}]
    prompt = Prompt(id="0", messages=({"role": "user", "content": "?"},), prompt_ids=(), columns={"answer": "1"})
    check_reward_functions(RewardConfig.model_validate({"functions": functions}), [prompt])


def prompts_of(folder: Path, *rows: dict[str, object]) -> list[Prompt]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {i}", **row}) + "\n" for i, row in enumerate(rows)))
    data = PromptDataConfig.model_validate({"source": {"path": str(file)}, "prompt_key": "prompt", "held_out": 0})
    return sorted(load_prompts(data, byte_tokenizer()).train, key=lambda prompt: prompt.where)


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("form:matches", {"pattern": "("}, "pattern: got '(' (missing ), unterminated subpattern"),
        ("form:matches", {"pattern": "(a+)+b"}, "which repeats something of variable length"),
        ("form:matches", {"pattern": 5}, "pattern: got 5, expected the text of a regular expression; correct the row"),
        ("form:valid_json", {"json_schema": {"type": "foo"}}, "expected a JSON Schema; correct it"),
        ("instructions:instructions_met", {"instruction_id_list": ["no:such"], "kwargs": [{}]}, "got 'no:such', exp"),
        (
            "instructions:instructions_met",
            {"instruction_id_list": 5, "kwargs": None},
            "got 5, expected a list of names",
        ),
        (
            "instructions:all_instructions_met",
            {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"x": 1}]},
            "kwargs: got {'x': 1} for punctuation:no_comma",
        ),
        (
            "choice:choice",
            {"answer": None},
            "got 1 of 2 rows, this one first, without 'answer' that choice:choice can",
        ),
        ("choice:choice", {"answer": 42}, "expected at most 0%; mend or remove them, or raise reward.max_unscorable"),
    ],
)
def test_rows_that_cannot_be_scored_are_named_by_their_line(tmp_path, name, row, said):
    good = {
        "form:matches": {"pattern": "a"},
        "form:valid_json": {"json_schema": {}},
        "choice:choice": {"answer": "C"},
    }.get(name, {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})
    prompts = prompts_of(tmp_path, good, row)
    text = refusal(name, {}, prompts)
    assert text.startswith(f"{tmp_path}/rows.jsonl:2: reward.functions: ")
    assert said in text
    check_reward_functions(RewardConfig.model_validate({"functions": [{"name": name}]}), prompts[:1])


def test_a_test_of_a_program_is_read_at_the_door():
    check = vars(load_function("sandbox:passes_tests"))["row"]
    assert check(tests=["assert f(1) == 2"]) is True
    assert check(tests=None) is False
    with pytest.raises(ValueError, match="tests: got 'f', expected stdin and stdout"):
        check(tests=["f"])


def test_rows_without_a_score_are_borne_up_to_the_budget(tmp_path):
    prompts = prompts_of(tmp_path, {"answer": "C"}, {})
    borne = {"functions": [{"name": "choice:choice"}], "max_unscorable": 0.5}
    check_reward_functions(RewardConfig.model_validate(borne), prompts)
    said = refusal("choice:choice", {}, prompts, max_unscorable=0.4)
    assert "got 1 of 2 rows" in said
    assert "at most 40%" in said
    # Gold rules have no say in what a run bears, and still name what would break them.
    plain = [{"name": "text:no_refusal"}]
    held_out = {"functions": plain, "gold": [{"name": "choice:choice"}]}
    check_reward_functions(RewardConfig.model_validate(held_out), prompts)
    broken = prompts_of(tmp_path, {"pattern": "("})
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: reward\.gold: form:matches: pattern: got '\('"):
        check_reward_functions(
            RewardConfig.model_validate({"functions": plain, "gold": [{"name": "form:matches"}]}), broken
        )


def test_modules_to_choose_from_have_reward_functions():
    for name in ("serve:main", "txt:finished_sentence"):
        with pytest.raises(ValueError) as refused:
            load_function(name)
        said = str(refused.value)
        assert "'text'" in said
        assert not re.search(r"'(admission|transport|batcher|units|serve_app)'", said)
    with pytest.raises(ValueError, match="got module 'serve', which has no reward functions, expected one of"):
        load_function("serve:main")
    with pytest.raises(
        ValueError, match=r"got 'finished_sentence', expected MODULE:FUNCTION such as .*; put the module"
    ):
        load_function("finished_sentence")


def test_certificates_that_are_none(tmp_path):
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    for url in (REMOTE["url"], "https://x.example.com/score"):
        said = refusal("remote:score", {"url": url, "ca_file": str(file)})
        assert (
            f"remote:score: remote.ca_file: got '{file}' (SSLError), expected a file of certificates in PEM format"
            in said
        )


def test_certificates_that_are_gone_in_a_run_are_named(tmp_path):
    file = tmp_path / "ca.pem"
    file.write_text(Path(certifi.where()).read_text())
    client = JsonClient("https://127.0.0.1:1/score", ca_file=str(file), retries=0)
    file.unlink()
    with pytest.raises(ValueError, match=r"ca_file: got '.*ca\.pem' \(FileNotFoundError\), expected .*; correct"):
        client.post({})
