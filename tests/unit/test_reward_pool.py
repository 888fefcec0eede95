"""Reward functions that hang, crash and take too much: cut, named and counted, while the others keep their numbers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.pool import Part, PoolFunction, RewardPool

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '''
"""What goes wrong in reward functions, each told to by the text of an answer."""

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time

from rewards.base import Part


def act(prompts, responses, *, factor=1.0, **columns):
    return [float(one(text)) * factor if text[:1].isalpha() else float(text) for text in responses]


def one(text):
    if text == "hang":
        while True:
            pass
    if text == "hold":  # the interpreter's lock, in C: no thread of the process ever runs again
        ctypes.PyDLL(None).pause()
    if text == "sleep":
        time.sleep(600)
    if text == "exit":
        os._exit(3)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "memory":
        return len(bytearray(64 * 2**30))
    if text == "blow":
        rows = []
        while True:
            rows.append(bytearray(2**24))
    if text == "flood":
        for _ in range(3000):
            os.write(1, b"x" * 2**16)
        return 5
    if text == "raise":
        raise ZeroDivisionError("no such thing")
    if text == "leave":
        sys.exit("bye")
    if text == "deep":
        return one(text)
    if text == "child":  # which a killed function leaves behind, in a process group of its own
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
        time.sleep(600)
    if text.startswith("daemon"):  # a grandchild that is its own session; its number is left in a file
        if not os.fork():
            os.setsid()
            if not os.fork():
                with open(text.removeprefix("daemon "), "w") as file:
                    file.write(str(os.getpid()))
                time.sleep(600)
            os._exit(0)
        time.sleep(600)
    if text == "interrupt":
        raise KeyboardInterrupt
    if text == "random":
        return random.random() + sum(0.1 * hash(word) for word in {"a", "b", "c"})
    if text == "value":
        return 7
    raise AssertionError(text)


def odd(prompts, responses, **columns):
    kinds = {"nan": float("nan"), "inf": float("-inf"), "bool": True, "text": "1.0", "list": [1.0], "none": None}
    return [kinds[text] if text in kinds else 10**400 if text == "big" else float(text) for text in responses]


def short(prompts, responses, **columns):
    return [1.0] * (len(responses) - 1)


def number(prompts, responses, **columns):
    return 1.0


def telling(prompts, responses, **columns):
    failures = {i: f"shy: {text}" for i, text in enumerate(responses) if text == "no"}
    counts = {"seen_count": float("nan") if "count badly" in responses else len(responses)}
    return Part([None if i in failures else 1.0 for i in range(len(responses))], failures, counts)


def fork(prompts, responses, *, how, **columns):
    """Its child ends when it is told to, or goes on as if it were the function itself."""
    if not (child := os.fork()):
        if how[0] == "exit":
            sys.exit(0)
        if how[0] == "raise":
            raise ValueError("of the child")
        return [999.0] * len(responses)
    _, status = os.waitpid(child, 0)
    return [float(text) + os.waitstatus_to_exitcode(status) for text in responses]


def speak(prompts, responses, **columns):
    """Says something more than its answer."""
    body = json.dumps({"numbers": [999.0] * len(responses), "call": "another"}).encode()
    channel = int(sys.argv[1])
    if responses[0] == "speak":
        os.write(channel, len(body).to_bytes(4, "big") + body)
    return [float(text) if text != "speak" else 1.0 for text in responses]


def mutate(prompts, responses, **columns):
    responses.clear()
    return []


def grow(prompts, responses, **columns):
    responses.append("one more")
    prompts.clear()
    return [1.0] * len(responses)


def reasons(prompts, responses, **columns):
    return Part([None] * len(responses), {i: text for i, text in enumerate(responses)})


def count(prompts, responses, *, name, **columns):
    return Part([0.5] * len(responses), {}, {name[0]: 777.0})


def whole(prompts, responses, *, note, **columns):
    return [float(len(prompts)) if one == responses[0] else 0.5 for one in note]
'''


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A copy of the rewards package with one module more, to be imported by the processes instead of it."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(ROOT / "rewards", folder / "rewards", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "rewards" / "hostile.py").write_text(HOSTILE)
    return folder


@pytest.fixture
def opened(hostile, monkeypatch):
    """Start pools that are closed at the end, when nothing may be left of them."""
    monkeypatch.syspath_prepend(str(hostile))
    before, pools = family(), []

    def start(name: str = "act", *, num_workers: int = 1, memory_mb: int = 2048, **function) -> RewardPool:
        function = {"time_limit": 30.0, **function}
        pool = RewardPool(
            {"part": PoolFunction(name=f"hostile:{name}", **function)}, num_workers=num_workers, memory_mb=memory_mb
        )
        pools.append(pool)
        pool.start()
        return pool

    yield start
    for pool in pools:
        pool.close()
    assert family() - before == set()


def family() -> set[int]:
    """What descends from this process."""
    found, parents = {os.getpid()}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def ask(pool: RewardPool, responses: list[str], **columns: list) -> Part:
    return pool.score([f"p{i}" for i in range(len(responses))], responses, columns).result(timeout=300)["part"]


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("hang", "timeout: no answer within 1 s"),
        ("hold", "timeout: no answer within 1 s"),
        ("sleep", "timeout: no answer within 1 s"),
        ("child", "timeout: no answer within 1 s"),
        ("exit", "crash: the process ended with exit code 3"),
        ("segfault", "crash: the process ended with SIGSEGV"),
        ("killed", "crash: the process ended with SIGKILL"),
        ("memory", "memory: more than reward.execution.memory_mb"),
        ("blow", "memory: more than reward.execution.memory_mb"),
        ("raise", "error: ZeroDivisionError: no such thing (hostile.py:"),
        ("leave", "error: SystemExit: bye (hostile.py:"),
        ("interrupt", "error: KeyboardInterrupt"),
        ("deep", "error: RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_one_answer_that_breaks_the_function_is_cut_and_the_others_keep_their_numbers(opened, text, failure):
    pool = opened(time_limit=1.0 if failure.startswith("timeout") else 30.0, samples_per_call=4)
    responses = ["1", "2.5", text, "-3", "4", "5"]
    part = ask(pool, responses)
    assert part.numbers == [1.0, 2.5, None, -3.0, 4.0, 5.0]
    assert list(part.failures) == [2]
    assert part.failures[2].startswith(failure)
    assert ask(pool, ["6"]) == Part([6.0], {})  # it goes on


def test_a_flood_is_cut_and_the_number_kept(opened, capsys):
    assert ask(opened(), ["flood", "1"]) == Part([5.0, 1.0], {})
    assert capsys.readouterr().err == "x" * 2000


def test_twenty_that_hang_leave_no_process(opened):
    pool = opened(num_workers=4, time_limit=0.5, samples_per_call=1)
    before = family()
    part = ask(pool, ["hang", "child"] * 10)
    assert part.numbers == [None] * 20
    assert {part.failures[i].partition(":")[0] for i in range(20)} == {"timeout"}
    assert len(family()) <= len(before)


def test_a_daemon_ends_with_the_function_that_left_it(opened, tmp_path):
    part = ask(opened(time_limit=3.0), [f"daemon {tmp_path / 'pid'}"])
    assert part.failures[0].startswith("timeout")
    assert not alive(int((tmp_path / "pid").read_text()))


def test_numbers_that_are_none_are_named_one_by_one(opened):
    part = ask(opened("odd"), ["1", "nan", "inf", "bool", "text", "list", "none", "big", "-2", "1e200", "3.4e38"])
    assert part.numbers == [1.0, *[None] * 7, -2.0, None, 3.4e38]
    assert part.failures[9] == "invalid: got 1e+200, expected a finite number that float32 can hold, or None"
    assert part.failures[6] == "none: the function gave no number"
    told = [part.failures[i] for i in (1, 2, 3, 4, 5)]
    assert told == [
        f"invalid: got {shown}, expected a finite number that float32 can hold, or None"
        for shown in ("nan", "-inf", "True", "'1.0'", "[1.0]")
    ]
    assert part.failures[7].startswith("invalid: got 1000")


@pytest.mark.parametrize(("name", "failure"), [("short", "invalid: got 0 numbers"), ("number", "invalid: got float")])
def test_a_function_that_gives_no_list_scores_nothing(opened, name, failure):
    part = ask(opened(name), ["1", "2", "3"])
    assert part.numbers == [None] * 3
    assert all(part.failures[i].startswith(failure) for i in range(3))


def test_the_scores_do_not_depend_on_the_number_of_processes(opened):
    responses = ["random", "1", "hang", "random", "exit", "2", "raise", "random", "value", "3"] * 2
    parts = [
        ask(opened(num_workers=num_workers, time_limit=2.0, samples_per_call=3), responses)
        for num_workers in (1, 2, 5)
    ]
    assert parts[0] == parts[1] == parts[2]
    assert parts[0].numbers[0] is not None
    assert sorted(parts[0].failures) == [2, 4, 6, 12, 14, 16]


def test_a_process_that_was_killed_from_outside_costs_no_answer(opened):
    pool = opened(samples_per_call=1)
    for _ in range(2):
        (worker,) = pool._workers
        os.kill(worker.process.pid, signal.SIGKILL)
        assert ask(pool, ["1", "value"]) == Part([1.0, 7.0], {})


def test_settings_and_columns_reach_the_function(opened):
    assert ask(opened(settings={"factor": 3.0}), ["value", "2"]).numbers == [21.0, 2.0]
    pool = opened("whole", samples_per_call=2)
    assert ask(pool, ["é\ud800", "b", "c"], note=["é\ud800", "b", "c"]).numbers == [2.0, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"got a column with values that are no plain data \(Object of type set"):
        ask(pool, ["a"], note=[{1}])


def test_a_function_that_cannot_be_loaded_is_refused_at_the_start(opened):
    with pytest.raises(ValueError, match=r"ValueError: reward function: got 'nothing' in rewards\.hostile"):
        opened("nothing")


def test_a_killed_owner_leaves_no_process(hostile):
    """Workers that hang, and one that waits: all end with the process that started them."""
    code = f"""
import sys, threading
sys.path.insert(0, {str(hostile)!r})
from rewards.pool import *
pool = RewardPool({{"part": PoolFunction(name="hostile:act", time_limit=600.0, samples_per_call=1)}}, num_workers=3)
pool.start()
pending = pool.score(["p"] * 2, ["hold", "hang"], {{}})
print(*[worker.process.pid for worker in pool._workers], flush=True)
pending.result()
"""
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(word) for word in owner.stdout.readline().split()]
    assert len(pids) == 3
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_pool_is_closed_while_it_waits(opened):
    pool = opened(time_limit=600.0)
    pending = pool.score(["p"], ["hang"], {})
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 30
    with pytest.raises(RuntimeError, match="got a closed pool"):
        pending.result()
    pool.close()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_function_may_give_reasons_and_counts_which_are_added_up(opened, num_workers):
    pool = opened("telling", num_workers=num_workers, samples_per_call=2)
    responses = ["a", "no", "b", "c", "no"]
    part = pool.score(["q"] * 5, responses, {}).result()["part"]
    assert part.numbers == [1.0, None, 1.0, 1.0, None]
    assert part.failures == {1: "shy: no", 4: "shy: no"}
    assert part.counts == {"seen_count": 5}
    assert pool.score(["q"], ["a"], {}).result()["part"].counts == {"seen_count": 1}
    bad = pool.score(["q"] * 2, ["a", "count badly"], {}).result()["part"]
    assert bad.numbers == [1.0, None]
    assert bad.failures[1].startswith("invalid: got counts {'seen_count': nan}")


@pytest.mark.parametrize(("how", "code"), [("exit", 0), ("raise", 1), ("return", 1)])
def test_a_child_that_a_function_forked_never_answers(opened, how, code):
    """The function itself sees how it ended."""
    pool = opened("fork", samples_per_call=2)
    for first in (0, 10):
        responses = [str(first + i) for i in range(4)]
        assert ask(pool, responses, how=[how] * 4) == Part([first + i + code for i in range(4)], {})
    assert len(pool._workers) == 1


def test_what_is_no_answer_to_the_call_is_never_taken_for_one(opened):
    """The process that said it is replaced, and the others' answers are their own."""
    part = ask(opened("speak", samples_per_call=1), ["1", "speak", "2", "3"])
    assert part.numbers == [1.0, None, 2.0, 3.0]
    assert part.failures[1].startswith("crash: an answer to another call: the process ended with ")


@pytest.mark.parametrize(("name", "got"), [("mutate", 0), ("grow", 2)])
def test_a_function_that_changes_what_it_is_given_scores_nothing(opened, name, got):
    part = ask(opened(name), ["1", "2", "3"])
    assert part.numbers == [None] * 3
    assert part.failures == dict.fromkeys(range(3), f"invalid: got {got} numbers, expected 1, one per response")


def test_a_reason_begins_with_its_kind(opened):
    part = ask(opened("reasons"), ["shy: no", "lost_it", "my own words", "gold/x:mean: no", "", "Shy: no", "a" * 33])
    kinds = [part.failures[i].partition(":")[0] for i in range(7)]
    assert kinds == ["shy", "lost_it", "invalid", "invalid", "none", "invalid", "invalid"]
    assert part.failures[2] == (
        "invalid: got the reason 'my own words', expected KIND: WHAT HAPPENED with a KIND of a-z and _"
    )


@pytest.mark.parametrize("name", ["mean", "std", "unscored_count", "clipped_share", "proxy_spearman", "a/mean", ""])
def test_a_function_does_not_count_under_a_name_that_the_run_measures(opened, name):
    part = ask(opened("count"), ["1"], name=[name])
    assert (part.numbers, part.counts) == ([None], {})
    assert part.failures[0].startswith(f"invalid: got counts {{{name!r}: 777.0}}, expected numbers under names of a-z")
    assert ask(opened("count"), ["1"], name=["request_count"]) == Part([0.5], {}, {"request_count": 777.0})
