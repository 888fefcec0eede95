"""Rewards per second: `python benchmarks/rewards.py [SECTION ...]`.

Sections: rules (each rule reward on one core, by answers of a realistic length), hostile (its slowest
answer among some of a million characters).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rewards.base import load_function

ROWS = 128
SECONDS = 0.2

WORKED = (
    "The patient's height is 175 cm, which is 175 / 100 = 1.75 m, and the weight is 70 kg. The body mass index is the "
    "weight divided by the square of the height, so we compute 70 / (1.75 * 1.75) = 22.857 kg/m^2. This lies within "
    "the normal range of 18.5 to 24.9, so no treatment is needed at present; the patient should keep to a balanced "
    "diet and take regular exercise, and see a doctor when the weight changes without a reason. "
)
CHINESE = "患者身高175厘米，体重70公斤，体重指数等于体重除以身高的平方，即 70 / (1.75 * 1.75) = 22.857，属于正常范围。"
QUESTION = "Which drug is best?\nA. Aspirin\nB. Ibuprofen\nC. Lisinopril\nD. Vitamin K"
SCHEMA = {
    "type": "object",
    "required": ["drug", "dose"],
    "properties": {"drug": {"type": "string"}, "dose": {"type": "number"}},
}
INSTRUCTIONS = ["punctuation:no_comma", "length_constraints:number_words", "keywords:existence"]
SETTINGS = [{}, {"num_words": 50, "relation": "at least"}, {"keywords": ["patient", "weight"]}]

RULES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "choice:choice": ((f"{WORKED}The answer is B.", f"{CHINESE}答案：B", "B. Ibuprofen"), {"answer": "B"}),
    "numbers:final_number": (
        (f"{WORKED}The answer is 22.86 kg/m^2.", f"{CHINESE}答案是22.86", WORKED),
        {"answer": 22.857, "lower": 21.7, "upper": 24.0, "unit": "kg/m^2"},
    ),
    "short_answer:same_answer": ((f"{WORKED}The answer is ibuprofen.", "布洛芬"), {"answer": "ibuprofen"}),
    "short_answer:word_f1": ((f"{WORKED}The answer is ibuprofen twice a day.", "布洛芬"), {"answer": "ibuprofen"}),
    "short_answer:list_f1": (
        ("Fever, cough and a headache.", "答案是：发热、咳嗽和头痛。"),
        {"answer": ["fever", "cough", "headache"]},
    ),
    "form:matches": ((f"{WORKED}Answer: B", f"{CHINESE}Answer: C"), {"pattern": r"Answer:\s*+[A-D]"}),
    "form:valid_json": (('{"drug": "aspirin", "dose": 100}', '{"drug": "aspirin"}', WORKED), {"json_schema": SCHEMA}),
    "form:tagged_sections": ((f"<think>{WORKED}</think><answer>B</answer>", WORKED), {}),
    "form:in_language": ((WORKED, CHINESE * 3), {"language": "zh"}),
    "instructions:instructions_met": (
        (WORKED, CHINESE * 3),
        {"instruction_id_list": INSTRUCTIONS, "kwargs": SETTINGS},
    ),
    "calculators:calculated": (
        (f"{WORKED}The answer is 22.86.", f"{WORKED}The answer is 30.", f"{CHINESE}答案是30"),
        {"answer": 22.857, "lower": 21.7, "upper": 24.0, "unit": "kg/m^2", "steps": [1.75]},
    ),
    "exact_match:multiple_choice": ((f"{WORKED}The answer is B.", f"{CHINESE}答案：B"), {"answer": "B"}),
    "medical:advises_care": ((WORKED, CHINESE * 3), {}),
    "medical:unsafe_advice": ((WORKED, CHINESE * 3), {}),
    "text:finished_sentence": ((WORKED, CHINESE * 3), {}),
    "text:length_between": ((WORKED, CHINESE * 3), {}),
    "text:no_repetition": ((WORKED, CHINESE * 3), {}),
    "text:no_refusal": ((WORKED, CHINESE * 3), {}),
}
"""By reward: answers, which take turns and are each made different, and the columns of every row."""


def rules() -> None:
    """Scores per second of each rule reward on one core. Every row's answer is another text, so nothing is cached."""
    print(f"{'rule':32} {'scores/s/core':>14} {'characters':>11}")
    for name, (answers, columns) in RULES.items():
        function = load_function(name)
        responses = [f"Case {row}: {answers[row % len(answers)]}" for row in range(ROWS)]
        if name == "form:valid_json":
            responses = [answers[row % len(answers)].replace("aspirin", f"aspirin {row}") for row in range(ROWS)]
        given = {key: [value] * ROWS for key, value in columns.items()}
        prompts = [f"Case {row // 4}. {QUESTION}" for row in range(ROWS)]
        rate = per_second(lambda f=function, p=prompts, r=responses, c=given: f(p, r, **c), ROWS)
        print(f"{name:32} {rate:14,.0f} {sum(map(len, responses)) / ROWS:11.0f}")


HOSTILE = (
    *("1 ", "9", "=", "- ", "\n", " ", "(", "[", "a,b;", "```", "answer is ", "The answer is B. ", "A. B. C. D. "),
    *("<think>", "<answer>", "\\boxed{", "\\frac{", "word ", "一", "１", "选", "a中", "no "),
)
"""What is repeated up to a million characters."""


def hostile() -> None:
    """Processor milliseconds of each rule reward for the slowest of `HOSTILE`, the best of three calls."""
    print(f"{'rule':32} {'worst ms':>9}  of")
    for name, (_, columns) in RULES.items():
        function = load_function(name)
        given = {key: [value] for key, value in columns.items()}
        took = {piece: 1000 * quickest(function, (piece * 1_000_000)[:1_000_000], given) for piece in HOSTILE}
        worst = max(took, key=lambda piece: took[piece])
        print(f"{name:32} {took[worst]:9.1f}  {worst!r}")


def quickest(function: Callable[..., object], answer: str, columns: dict[str, Any]) -> float:
    """Processor seconds of the quickest of three calls with one answer."""
    times = []
    for _ in range(3):
        began = time.process_time()
        function([QUESTION], [answer], **columns)
        times.append(time.process_time() - began)
    return min(times)


def per_second(call: Callable[[], object], count: int) -> float:
    """How many of the `count` things that one call does are done in a second of processor time, warm."""
    call()
    calls, began = 0, time.process_time()
    while (took := time.process_time() - began) < SECONDS:
        call()
        calls += 1
    return calls * count / took


SECTIONS: dict[str, Callable[[], None]] = {"rules": rules, "hostile": hostile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    asked = parser.parse_args().sections or list(SECTIONS)
    if unknown := [section for section in asked if section not in SECTIONS]:
        parser.error(f"got section {unknown[0]!r}, expected one of {', '.join(SECTIONS)}")
    for section in asked:
        SECTIONS[section]()


if __name__ == "__main__":
    main()
