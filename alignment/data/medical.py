"""Preference pairs from real clinical text: which plan treats this disease, and which answer is finished.

The source is a set of clinical notes, each with diagnoses and a treatment plan for each of them. A plan becomes
two pairs: against the plan of another disease (relevance) and against itself cut in mid-sentence (completeness).
Chosen and rejected have about the same length, so a reward model cannot win by counting tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from alignment.data.assets import fetch_asset
from alignment.data.files import Row, read_file

QUESTIONS = (
    "How is {} treated?",
    "What is the treatment for {}?",
    "How do doctors treat {}?",
    "What can be done about {}?",
    "What helps with {}?",
)
SHORTEST, LONGEST = 15, 60  # words of an answer
MAX_OVERLAP = 0.15  # of content words between two plans that count as different

_HEADING = re.compile(r"^(?P<name>[^:]{3,80}?)(?: Treatment)?\s*:\s*$")
_DIAGNOSED = re.compile(
    r"(?:diagnosed with|Primary Diagnosis:|Condition:|condition is|indicative of|suggestive of)\s+"
    r"(?:Inflammatory Bowel Disease \(IBD\), (?:specifically|particularly) )?(?P<name>[^,.\n]+)"
)
_TITLE = re.compile(r"^Treatment Plan:?$")
_BULLET = re.compile(r"^[•·\-*\s]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_KEEPS_CAPITAL = re.compile(
    r"^\W*(?:[A-Z]\w*'s|\w*[A-Z]\w*[A-Z]\w*|C|D|Kaposi|Meige|Mikulicz|Fordyce|Le|Fort|Coxsackievirus)\W*$"
)
_COMMON_WORDS = frozenset(
    re.findall(
        r"\S+",
        "about after also daily days each every exercise follow follow-up from have include including into lifestyle "
        "like management medication medications monitor monitoring needed once orally patient pain prescribe regimen "
        "regular regularly should such symptoms take their this three times treatment twice week weeks with",
    )
)


@dataclass(frozen=True, slots=True)
class TreatmentPlan:
    """How one disease was treated in one note."""

    disease: str
    """As it reads inside a sentence."""
    group: str
    """The same for all spellings of the disease: what a split must keep together."""
    sentences: tuple[str, ...]
    where: str

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def treatment_plan_pairs(seed: int = 1) -> list[Row]:
    """Rows with `prompt`, `chosen`, `rejected`, `kind` ("other_disease" or "unfinished") and `group`.

    The same rows for the same seed. `group` is the disease: split by it.
    """
    plans = treatment_plans()
    words = [_content_words(plan.text) for plan in plans]
    rows = []
    for index, plan in enumerate(plans):
        choice = random.Random(f"{seed}:{plan.group}:{plan.text}")
        prompt = choice.choice(QUESTIONS).format(plan.disease)
        chosen = _first_sentences(plan.sentences, choice.randint(18, 48))
        length = len(chosen.split())
        others = [
            other
            for other, theirs in zip(plans, words, strict=True)
            if other.group != plan.group and _overlap(words[index], theirs) < MAX_OVERLAP
        ]
        rejected = {"unfinished": _unfinished(plan.text, round(length * choice.uniform(0.85, 1.4)))}
        if others:
            another = min(choice.sample(others, min(4, len(others))), key=lambda o: abs(_words(o, length) - length))
            rejected["other_disease"] = _first_sentences(another.sentences, max(length + 8, 25))
        for kind, text in sorted(rejected.items()):
            if chosen and text and text != chosen:
                values = {"prompt": prompt, "chosen": chosen, "rejected": text, "kind": kind, "group": plan.group}
                rows.append(Row(values, plan.where))
    return rows


def treatment_plan_answers(seed: int = 1) -> list[Row]:
    """Rows with `prompt`, `completion` and `group`: a question about a disease, and a whole plan of a clinician.

    The same rows for the same seed. `group` is the disease: split by it.
    """
    rows = []
    for plan in treatment_plans():
        prompt = random.Random(f"{seed}:{plan.group}:{plan.text}").choice(QUESTIONS).format(plan.disease)
        rows.append(Row({"prompt": prompt, "completion": plan.text, "group": plan.group}, plan.where))
    return rows


def treatment_plans() -> list[TreatmentPlan]:
    """The distinct plans of the notes, in file order."""
    seen: set[str] = set()
    plans = []
    for file in sorted(fetch_asset("clinical-plans").iterdir()):
        for row in read_file(file):
            for plan in _plans_of_note(row):
                key = " ".join(re.findall(r"\w+", f"{plan.group} {plan.text}".lower()))
                if key not in seen and len(plan.text.split()) >= SHORTEST:
                    seen.add(key)
                    plans.append(plan)
    return plans


def repair_mojibake(text: str) -> str:
    """Undo UTF-8 that was once read as Latin-1 or Windows-1252: "SjÃ¶gren" becomes "Sjögren"."""

    def undo(match: re.Match[str]) -> str:
        for encoding in ("latin-1", "cp1252"):
            try:
                return match.group().encode(encoding).decode("utf-8")
            except UnicodeError:
                continue
        return match.group()

    return re.sub(r"[Â-ï][\u0080-\u00bf\u2013-\u203a\u20ac\u2122]{1,2}", undo, text)


def _plans_of_note(row: Row) -> Iterator[TreatmentPlan]:
    note = {key.strip(): repair_mojibake(str(value)) for key, value in row.values.items()}
    people = re.findall(r"Name: (\w+) (\w+)", note.get("Patient info A", ""))
    lines = [_BULLET.sub("", line).strip() for line in note["Treatment"].splitlines()]
    lines = [line for line in lines if line and not _TITLE.match(line)]
    for disease, body in _sections(note, lines):
        sentences = tuple(_sentences(body))
        text = " ".join(sentences)
        if sentences and not any(name in text.split() for person in people for name in person):
            yield TreatmentPlan(_inside_sentence(disease), _group(disease), sentences, row.where)


def _sections(note: dict[str, str], lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """`(disease, lines of its plan)`: one for each heading, or a single diagnosis with the whole plan."""
    if note.get("clinical_domain") == "gastro":
        if found := _DIAGNOSED.search(note["Diagnosis"]):
            yield found["name"].strip(), lines
        return
    disease, body = "", list[str]()
    for line in lines:
        if heading := _HEADING.match(line):
            if disease and body:
                yield disease, body
            disease, body = heading["name"].strip(), []
        else:
            body.append(line)
    if disease and body:
        yield disease, body


def _sentences(lines: list[str]) -> Iterator[str]:
    label = ""
    for line in lines:
        if line.endswith(":") or (len(line.split()) <= 3 and line[-1] not in ".!?"):
            label = line.rstrip(":") + ": "
            continue
        whole, label = label + line, ""
        whole = " ".join(re.sub(r"^ecommended", "Recommended", whole).split())
        if whole[-1] not in ".!?":
            whole = whole.rstrip(",;:") + "."
        yield from _SENTENCE_END.split(whole[0].upper() + whole[1:])


def _inside_sentence(disease: str) -> str:
    disease = re.sub(r"^(.*), Acute$", r"acute \1", disease)
    return " ".join(word if _KEEPS_CAPITAL.match(word) else word.lower() for word in disease.split())


def _group(disease: str) -> str:
    """ "Hypertension (High Blood Pressure)" and "Hypertension" are one disease, "GERD" and its long name too."""
    short = {
        "copd": "chronic obstructive pulmonary disease",
        "gerd": "gastroesophageal reflux disease",
        "migraine headaches": "migraine",
        "depression": "major depressive disorder",
        "anxiety disorder": "generalized anxiety disorder",
        "diverticulitis": "diverticulosis",
        "mucocoele": "mucocele",
        "odontogenic sinusitis acute": "odontogenic sinusitis",
        "glossodynia": "burning mouth syndrome",
    }
    name = re.sub(r"\(.*?\)|\bmellitus\b", "", disease.lower())
    name = " ".join(re.sub(r"[-,]", "" if name.startswith("pre") else " ", name).split())
    return short.get(name, name)


def _first_sentences(sentences: tuple[str, ...], budget: int) -> str:
    """As many whole sentences as fit into `budget` words, one at least, `LONGEST` words at most (else "")."""
    taken: list[str] = []
    for sentence in sentences:
        if taken and len(" ".join([*taken, sentence]).split()) > budget:
            break
        taken.append(sentence)
    text = " ".join(taken)
    return text if len(text.split()) <= LONGEST else ""


def _words(plan: TreatmentPlan, budget: int) -> int:
    return len(_first_sentences(plan.sentences, budget).split())


def _unfinished(text: str, length: int) -> str:
    """About `length` words, cut where no sentence ends; "" when the text is too short for that."""
    words = text.split()
    for end in range(min(length, len(words) - 1), 5, -1):
        if words[end - 1][-1].isalnum():
            return " ".join(words[:end])
    return ""


def _content_words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z][a-z-]{3,}", text.lower())) - _COMMON_WORDS


def _overlap(ours: frozenset[str], theirs: frozenset[str]) -> float:
    return len(ours & theirs) / max(1, len(ours | theirs))
