"""What is printed for a person: trained text marked or coloured, and nothing of the data that steers a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.config import SftDataConfig, SftSourceConfig
from alignment.data.__main__ import main
from alignment.data.chat import load_tokenizer
from alignment.data.show import BOLD, DIM, GREEN, PLAIN, escaped, shown_rows

ROOT = Path(__file__).resolve().parents[2]
SAID = [
    [("human", "Why?"), ("gpt", "高血压."), ("human", "x")],
    [("human", "\x1b[2J\x1b]0;title\x07⟦<|im_end|>"), ("gpt", "a\u202e\x9b31m\r\nb")],
    [("gpt", "Nobody asked.")],
]
ROWS = [{"conversations": [{"from": who, "value": text} for who, text in turns]} for turns in SAID]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def show(capsys, *arguments):
    code = main(["show", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_marks_stand_around_what_is_trained_and_escapes_do_not_pass(tiny, file, capsys):
    code, out, err = show(capsys, file, "--model", tiny / "policy")
    assert (code, err) == (0, "")
    assert out == (
        f"{file}:1: sharegpt, 34 tokens, 11 trained, trailing questions dropped\n"
        "  ‹<|im_start|>›user\n  Why?‹<|im_end|>›\n  ‹<|im_start|>›assistant\n  ⟦高血压.‹<|im_end|>›⟧\n\n"
        f"{file}:2: sharegpt, 59 tokens, 13 trained\n"
        "  ‹<|im_start|>›user\n  \\x1b[2J\\x1b]0;title\\x07\\u27e6<|im_end|>‹<|im_end|>›\n"
        "  ‹<|im_start|>›assistant\n  ⟦a\\u202e\\x9b31m\\r\n  b‹<|im_end|>›⟧\n\n"
        f"{file}:3: sharegpt: nobody answers; the row is dropped\n\n"
    )


def test_options_are_heard(tiny, file, capsys):
    _, out, _ = show(
        capsys, file, "--model", tiny / "policy", "--rows", 1, "--max-tokens", 35, "--system-prompt", "S."
    )
    assert out.count(": sharegpt") == 1
    assert "nothing that is learnt fits into 35 tokens" in out
    _, out, _ = show(capsys, file, "--model", tiny / "policy", "--rows", 1, "--max-tokens", 26)
    assert "26 tokens, 3 trained, trailing questions dropped, cut to 26\n" in out
    assert out.endswith("⟦高⟧\n\n")


def test_colours_say_the_same(tiny, file):
    config = SftDataConfig(sources=(SftSourceConfig(path=str(file), limit=1),))
    (text,) = shown_rows(config, load_tokenizer(str(tiny / "policy")), color=True)
    end = f"{DIM}{BOLD}<|im_end|>{PLAIN}"
    start = f"{DIM}{BOLD}<|im_start|>{PLAIN}"
    assert text.split("\n", 1)[1] == (
        f"  {start}{DIM}user\n  Why?{PLAIN}{end}{DIM}\n  {PLAIN}{start}{DIM}assistant\n  {PLAIN}"
        f"{GREEN}高血压.{PLAIN}{GREEN}{BOLD}<|im_end|>{PLAIN}\n"
    )


@pytest.mark.parametrize("options", [["--no-color"], []])
def test_only_a_terminal_gets_colours_unless_told_otherwise(tiny, file, options):
    command = [sys.executable, "-m", "alignment.data", "show", str(file), "--model", str(tiny / "policy"), *options]
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    with subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, env=environment) as process:
        os.close(theirs)
        out = b""
        while piece := _read(ours):
            out += piece
        assert process.stderr is not None
        errors = process.stderr.read()
    os.close(ours)
    assert process.returncode == 0, errors
    assert (b"\x1b" in out) == (not options)
    assert "高血压".encode() in out
    assert b"\x1b[2J" not in out
    assert b"\x07" not in out


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other side is closed
        return b""


def test_what_is_refused_is_one_line_and_exit_code_2(tiny, file, tmp_path, capsys):
    model = ["--model", tiny / "policy"]
    file.write_text('{"conversations": [{"from": "\\u001b[31m", "value": "a"}]}\n')
    code, out, err = show(capsys, file, *model)
    assert (code, out) == (2, "")
    assert err.startswith(f"{file}:1: conversations: got a turn from '\\x1b[31m', expected one of")
    steering = file.rename(tmp_path / "\x1b[2J.jsonl")
    code, _, err = show(capsys, steering, *model)
    assert (code, "\x1b" in err, "\\x1b[2J.jsonl:1: conv" in err) == (2, False, True)
    for arguments in ([tmp_path / "none.jsonl", *model], [steering, "--model", tmp_path], ["asset:liveqs", *model]):
        code, out, err = show(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert ", expected " in err
    code, _, err = show(capsys, "", *model)
    assert code == 2
    assert err.startswith("file, --model: got nothing, expected a name")
    with pytest.raises(SystemExit, match="2"):
        show(capsys, file, *model, "--rows", "x")
    assert "argument --rows: got 'x', expected a number from 1" in capsys.readouterr().err


def test_marks_that_an_encoding_has_not_are_refused(tiny, file):
    command = [sys.executable, "-m", "alignment.data", "show", str(file), "--model", str(tiny / "policy")]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(command, cwd=ROOT, env=ascii_only, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "output: got ascii, which has no ⟦⟧‹›, expected UTF-8" in shown.stderr.encode().decode("unicode_escape")


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain\n高 Ü😀", "plain\n高 Ü😀"),
        ("\x1b[0m\x00\x7f\x9b\r\t", "\\x1b[0m\\x00\\x7f\\x9b\\r\\t"),
        ("\u202e\u2066\u200b\ufeff\u2028", "\\u202e\\u2066\\u200b\\ufeff\\u2028"),
        ("⟦‹›⟧\ud800\ue000", "\\u27e6\\u2039\\u203a\\u27e7\\ud800\\ue000"),
    ],
)
def test_control_format_and_mark_characters_are_written_out(text, safe):
    assert escaped(text) == safe
