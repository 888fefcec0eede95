"""Real data for supervised training, out of packages: sizes, shapes, and diseases that are never trained on."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from tiny import byte_tokenizer

from alignment.config import SftDataConfig, SftSourceConfig, SourceConfig
from alignment.data.diseases import disease_rows, diseases, held_out_questions, majority_floor
from alignment.data.formats import detect_format, lesson_of
from alignment.data.sft import load_sft_data
from alignment.data.sources import read_rows


@pytest.mark.parametrize(
    ("asset", "format", "count"),
    [
        ("alpaca-en-demo", "alpaca", 999),
        ("alpaca-zh-demo", "alpaca", 1000),
        ("treatment-plan-answers", "prompt_completion", 288),
        ("disease-table-zh", "prompt_completion", 129 * 14),
    ],
)
def test_every_row_of_an_asset_is_a_lesson(asset, format, count):
    rows = read_rows(SourceConfig(asset=asset))
    assert len(rows) == count
    assert detect_format(rows[0]) == format
    assert all(lesson_of(row, format).messages[-1]["role"] == "assistant" for row in rows)


def test_the_default_data_loads():
    data = load_sft_data(SftDataConfig(max_tokens=4096), byte_tokenizer(), seed=0)
    assert data.num_examples + len(data.held_out) == 288
    assert len(data.held_out) >= 64
    assert "cut" not in data.summary()


def test_conversations_end_where_the_file_is_cut(capsys):
    rows = read_rows(SourceConfig(asset="sharegpt"))
    assert len(rows) == 17_439
    assert capsys.readouterr().err == (
        "asset sharegpt: 17,671 whole conversations, and one cut off after 2,987 characters; 232 with an empty turn, "
        "none, or two in a row of one role are left out\n"
    )
    lessons = [lesson_of(row, "sharegpt") for row in rows]
    assert sum("leading_answers" in lesson.dropped for lesson in lessons) > 6000
    assert rows[0].values["conversations"][0]["value"].startswith("Summarize the main ideas of Jeff Walker")


def test_a_few_conversations_make_batches():
    source = SftSourceConfig(asset="sharegpt", limit=40)
    data = load_sft_data(SftDataConfig(sources=(source,), held_out=4), byte_tokenizer(), seed=0)
    assert all(0 < example.num_trained < len(example.input_ids) <= 512 for example in data.batch(0, 20))


def test_treatment_answers_are_finished_and_grouped_by_disease():
    rows = [row.values for row in read_rows(SourceConfig(asset="treatment-plan-answers"))]
    assert all(row["completion"][-1] in ".!?" for row in rows)
    assert len({row["group"] for row in rows}) >= 140
    assert len({row["prompt"].split()[0] for row in rows}) == 2  # "How", "What"


def test_the_table_is_read_whole():
    table = {disease.name: disease for disease in diseases()}
    assert len(table) == 158
    asthma = table["哮喘"]
    assert (asthma.icd10, asthma.department, asthma.symptoms[0]) == ("J45.909", "呼吸内科", "喘息")
    assert len(asthma.drugs) == 5


def test_held_out_diseases_are_in_no_training_row():
    out = {d.icd10 for d in diseases() if int(hashlib.sha1(d.icd10.encode()).hexdigest(), 16) % 5 == 0}
    names = {d.name for d in diseases() if d.icd10 in out}
    assert (len(out), len(names)) == (28, 29)
    rows = disease_rows()
    assert not {row.values["group"] for row in rows} & out
    # A name can be part of another disease's ("贫血" of "缺铁性贫血"): as a whole it is asked about nowhere.
    questions = {q.prompt for q in held_out_questions()}
    assert not {row.values["prompt"] for row in rows} & questions
    assert not {row.where.split(":")[1] for row in rows} & names
    assert {question.group for question in held_out_questions()} == out


def test_questions_have_an_answer_among_departments_that_were_trained():
    questions, rows = held_out_questions(), disease_rows()
    assert len(questions) == 29 * 9 - 3  # three by symptoms alone that a training disease shares
    departments = {row.values["completion"] for row in rows if row.values["kind"] == "department"}
    assert {question.choices for question in questions} == {tuple(sorted(departments))}
    assert len(departments) == 26
    assert all(question.answer in question.choices for question in questions)


def test_the_floor_is_the_share_of_the_most_frequent_training_department():
    trained = Counter(row.values["completion"] for row in disease_rows() if row.values["kind"] == "department")
    assert [name for name, _ in trained.most_common(2)] == ["呼吸内科", "消化内科"]  # a tie: 14 diseases each
    assert len({count for _, count in trained.most_common(2)}) == 1
    asked = Counter(question.answer for question in held_out_questions())
    assert majority_floor(held_out_questions()) == max(asked["呼吸内科"], asked["消化内科"]) / 258 == 45 / 258
