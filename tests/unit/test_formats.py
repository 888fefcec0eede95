"""Five shapes of rows give one conversation; what cannot be learnt from is refused by file and line."""

from __future__ import annotations

import pytest

from alignment.data.files import Row
from alignment.data.formats import FORMATS, Lesson, detect_format, lesson_of


def said(*turns: str) -> tuple[dict[str, str], ...]:
    """From "user: text" and so on."""
    return tuple({"role": t.split(": ")[0], "content": t.split(": ", 1)[1]} for t in turns)


def shared(*turns: str) -> list[dict[str, str]]:
    return [{"from": t.split(": ")[0], "value": t.split(": ", 1)[1]} for t in turns]


ASKED = said("user: Why?", "assistant: Because.")
LONG = said("system: Be brief.", "user: Why?", "assistant: Because.", "user: So?", "assistant: Yes.")

READ = [
    ("alpaca", {"instruction": "Why?", "input": "", "output": "Because."}, Lesson(ASKED)),
    ("alpaca", {"instruction": " Why?\n", "input": None, "output": "Because."}, Lesson(ASKED)),
    (
        "alpaca",
        {"instruction": "Sum up.", "input": "A text.\n", "output": " It is one. "},
        Lesson(said("user: Sum up.\n\nA text.", "assistant:  It is one. ")),
    ),
    (
        "alpaca",
        {"instruction": "So?", "output": "Yes.", "history": [["Why?", "Because."]], "system": "Be brief."},
        Lesson(LONG),
    ),
    ("sharegpt", {"conversations": shared("human: Why?", "gpt: Because.")}, Lesson(ASKED)),
    (
        "sharegpt",
        {"conversations": shared("system: Be brief.", "user: Why?", "bing: Because.", "human: So?", "chatgpt: Yes.")},
        Lesson(LONG),
    ),
    ("sharegpt", {"system": "Be brief.", "conversations": list(LONG[1:])}, Lesson(LONG)),
    (
        "sharegpt",
        {"conversations": shared("gpt: Hi", "human: Why?", "gpt: Because.", "human: And?")},
        Lesson(ASKED, dropped=("leading_answers", "trailing_questions")),
    ),
    (
        "sharegpt",
        {"conversations": shared("system: Be brief.", "gpt: Hi", *(f"{m['role']}: {m['content']}" for m in LONG[1:]))},
        Lesson(LONG, dropped=("leading_answers",)),
    ),
    ("sharegpt", {"conversations": shared("gpt: Hi")}, Lesson(dropped=("leading_answers",))),
    ("sharegpt", {"conversations": shared("human: Hi")}, Lesson(dropped=("trailing_questions",))),
    (
        "sharegpt",
        {"conversations": shared("human: 2+2", "gpt: calc", "observation: 4", "observation: four", "gpt: 4.")},
        Lesson(said("user: 2+2", "assistant: calc", "tool: 4", "tool: four", "assistant: 4.")),
    ),
    ("messages", {"messages": list(LONG)}, Lesson(LONG)),
    ("messages", {"prompt": "ignored", "messages": list(ASKED)}, Lesson(ASKED)),
    ("prompt_completion", {"prompt": "Why?", "completion": "Because."}, Lesson(ASKED)),
    ("prompt_completion", {"prompt": "Why?", "response": "Because."}, Lesson(ASKED)),
    ("prompt_completion", {"question": "Why?", "answer": "Because.", "text": "x"}, Lesson(ASKED)),
    ("prompt_completion", {"prompt": list(LONG[:-1]), "completion": [LONG[-1]]}, Lesson(LONG)),
    ("text", {"text": " plain\n", "id": 3}, Lesson(text=" plain\n")),
]


@pytest.mark.parametrize(("format", "values", "lesson"), READ)
def test_every_format_is_told_by_its_columns_and_read(format, values, lesson):
    row = Row(values, "f.jsonl:1")
    assert detect_format(row) == format
    assert lesson_of(row, format) == lesson


BAD = [
    ("alpaca", {"instruction": "a", "output": " "}, "'output': got an empty cell"),
    ("alpaca", {"instruction": "", "output": "b"}, "'instruction': got an empty cell"),
    ("alpaca", {"instruction": "a", "output": 7}, "'output': got int, expected text"),
    ("alpaca", {"instruction": ["a"], "output": "b"}, "'instruction': got list, expected text"),
    ("alpaca", {"instruction": "a", "input": {"x": 1}, "output": "b"}, "'input': got dict, expected text"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["q"]]}, "'history': got something else than pairs"),
    ("alpaca", {"instruction": "a", "output": None}, "got columns ['instruction'], expected instruction+output"),
    (
        "alpaca",
        {"prompt": "a", "completion": "b"},
        "got a row of format prompt_completion, expected instruction+output",
    ),
    ("sharegpt", {"conversations": "text"}, "'conversations': got str, expected a list of turns"),
    ("sharegpt", {"conversations": []}, "'conversations': got an empty list, expected a list of turns"),
    ("sharegpt", {"conversations": ["a"]}, "messages: got a str, expected an object"),
    ("sharegpt", {"conversations": shared("human: a", "alien: b")}, "got a turn from 'alien', expected one of"),
    ("sharegpt", {"conversations": [{"from": ["gpt"], "value": "b"}]}, "got a turn from ['gpt'], expected one of"),
    ("sharegpt", {"conversations": shared("human: a", "human: b", "gpt: c")}, "two turns in a row of role 'user'"),
    ("sharegpt", {"conversations": shared("human: a", "gpt: b", "bard: c")}, "two turns in a row of role 'assistant'"),
    ("sharegpt", {"conversations": shared("human: a", "gpt:  ")}, "got an empty turn of role 'assistant'"),
    ("sharegpt", {"conversations": shared("human:  ", "gpt: b")}, "got an empty turn of role 'user'"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": 3}]}, "content of type int"),
    ("messages", {"messages": [{"role": "robot", "content": "a"}]}, "got one with role 'robot'"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "content of type NoneType"),
    ("messages", {"messages": {"role": "user", "content": "a"}}, "'messages': got dict, expected a list of turns"),
    ("prompt_completion", {"prompt": " ", "completion": "b"}, "got an empty prompt, expected text"),
    ("prompt_completion", {"prompt": "a", "completion": ""}, "'completion': got an empty cell"),
    ("prompt_completion", {"prompt": "a", "completion": 1.5}, "'completion': got float, expected text"),
    ("prompt_completion", {"prompt": list(ASKED), "completion": "b"}, "'prompt': got a last turn of role 'assistant'"),
    ("text", {"text": "\n"}, "'text': got an empty cell"),
    ("text", {"text": 5}, "'text': got int, expected text"),
]


@pytest.mark.parametrize(("format", "values", "reason"), BAD)
def test_what_cannot_be_learnt_from_is_refused_by_its_place(format, values, reason):
    with pytest.raises(ValueError, match=r"^f\.jsonl:7: .*, expected .*; ") as caught:
        lesson_of(Row(values, "f.jsonl:7"), format)
    assert reason in str(caught.value)
    assert str(caught.value).count("f.jsonl:7") == 1


def test_columns_of_no_format_and_of_two_are_told_what_each_needs():
    with pytest.raises(ValueError, match=r"^f:1: got columns \['a'\], expected those of a format") as caught:
        detect_format(Row({"a": 1, "text": None}, "f:1"))
    assert all(f"{name}: {format}" in str(caught.value) for name, format in FORMATS.items())
    assert "prompt+completion or prompt+response or question+answer" in str(caught.value)
    both = {"messages": list(ASKED), "conversations": list(ASKED)}
    with pytest.raises(ValueError, match=r"which fit messages and sharegpt, expected one format .*; set format"):
        detect_format(Row(both, "f:1"))
