"""A Chinese table of diseases as questions and answers, and questions about diseases that were never trained on.

What can be worked out about an unknown disease is the department (科室) that treats it, from its name and symptoms:
that is what the evaluation asks. Symptoms, drugs and ICD-10 codes are learnt beside it.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from alignment.data.assets import fetch_asset
from alignment.data.files import Row

HELD_OUT_OF = 5
"""One in so many ICD-10 codes, by hash, is kept for the evaluation."""

QUESTIONS = {
    "department_by_name": (
        "{name}应该挂哪个科？",
        "得了{name}，去医院看什么科？",
        "请问{name}属于哪个科室的疾病？",
    ),
    "department_by_symptoms": (
        "我有{symptoms}等症状，应该挂哪个科？",
        "出现{symptoms}，去医院看什么科？",
        "病人的症状是{symptoms}。请问应该去哪个科室就诊？",
    ),
    "department": (
        "{name}的症状有{symptoms}，应该挂哪个科？",
        "病人患有{name}，表现为{symptoms}，应该看什么科？",
        "诊断：{name}。症状：{symptoms}。请问科室？",
    ),
    "symptoms": ("{name}有哪些症状？", "得了{name}会有什么表现？"),
    "drugs": ("{name}常用哪些药物？", "治疗{name}一般用什么药？"),
    "icd10": ("{name}的ICD-10编码是什么？",),
}
"""Wordings by kind. The first three ask for the department."""
DEPARTMENT_KINDS = ("department_by_name", "department_by_symptoms", "department")


@dataclass(frozen=True, slots=True)
class Disease:
    """One row of the table."""

    name: str
    icd10: str
    symptoms: tuple[str, ...]
    drugs: tuple[str, ...]
    department: str

    @property
    def held_out(self) -> bool:
        """Whether it is kept for the evaluation: by its code, so that two names of one code go the same way."""
        return int(hashlib.sha1(self.icd10.encode(), usedforsecurity=False).hexdigest(), 16) % HELD_OUT_OF == 0


@dataclass(frozen=True, slots=True)
class DiseaseQuestion:
    """A question with a closed list of answers."""

    prompt: str
    answer: str
    choices: tuple[str, ...]
    """The departments of the training diseases, sorted; `answer` is one of them."""
    kind: str
    group: str
    """ICD-10 code."""


@lru_cache(maxsize=1)
def diseases() -> tuple[Disease, ...]:
    """The table, read as a literal: none of the package's code is run."""
    tree = ast.parse(fetch_asset("disease-table-zh").read_text(encoding="utf-8"))
    (table,) = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.AnnAssign) and node.value)
    return tuple(
        Disease(
            name, entry["icd10"], tuple(entry["symptoms"]), tuple(entry["medications"]), entry["medical_specialty"]
        )
        for name, entry in table.items()
    )


def disease_rows() -> list[Row]:
    """Rows with `prompt`, `completion`, `group` (ICD-10 code) and `kind`, of the training diseases alone."""
    rows = []
    for disease in diseases():
        if not disease.held_out:
            for kind, prompt, answer in _asked(disease):
                values = {"prompt": prompt, "completion": answer, "group": disease.icd10, "kind": kind}
                rows.append(Row(values, f"disease-table-zh:{disease.name}"))
    return rows


def held_out_questions() -> list[DiseaseQuestion]:
    """For every held-out disease and each wording, the department. Read a score beside `majority_floor`.

    Where a training disease has the very symptoms, the question by symptoms alone is left out: it was trained on.
    """
    choices = tuple(sorted({disease.department for disease in diseases() if not disease.held_out}))
    trained_on = {row.values["prompt"] for row in disease_rows()}
    return [
        DiseaseQuestion(prompt, answer, choices, kind, disease.icd10)
        for disease in diseases()
        if disease.held_out and disease.department in choices
        for kind, prompt, answer in _asked(disease)
        if kind in DEPARTMENT_KINDS and prompt not in trained_on
    ]


def majority_floor(questions: Sequence[DiseaseQuestion]) -> float:
    """The score of always answering with the most frequent department of training; of several, the best score."""
    trained = Counter(disease.department for disease in diseases() if not disease.held_out)
    most = max(trained.values())
    asked = Counter(question.answer for question in questions)
    return max(asked[name] for name, count in trained.items() if count == most) / asked.total()


def _asked(disease: Disease) -> Iterator[tuple[str, str, str]]:
    """`(kind, question, answer)` for each wording."""
    symptoms = "、".join(disease.symptoms)
    answers = {
        **dict.fromkeys(DEPARTMENT_KINDS, disease.department),
        "symptoms": symptoms,
        "drugs": "、".join(disease.drugs),
        "icd10": disease.icd10,
    }
    for kind, wordings in QUESTIONS.items():
        for wording in wordings:
            yield kind, wording.format(name=disease.name, symptoms=symptoms), answers[kind]
