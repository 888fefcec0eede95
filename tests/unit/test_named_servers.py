"""The server and the judge as functions of a config: through the pool, an actor and a step of PPO."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from planted_server import Planted, planted_server
from reward_servers import reward_server
from tiny import byte_tokenizer
from tiny_loop import Loop

from actors.reward import RewardModelActor
from alignment.config import ModelConfig, RewardConfig
from alignment.data.prompts import make_prompt
from alignment.loops.ppo import train_ppo
from alignment.scores import score_metrics
from alignment.types import Prompt, Rollout
from recipes.checks import check_reward_functions

SECRET = "canary-token-5f1c"
QUICK = {"timeout": 5.0, "retries": 1, "backoff": 0.001, "max_wait": 0.01}
RUBRIC = "Ten for a right answer."


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def remote(url: str, **settings: object) -> dict[str, object]:
    return {"name": "remote:score", "part": "far", "time_limit": 30, "settings": {"url": url, **QUICK, **settings}}


def judge(url: str, **settings: object) -> dict[str, object]:
    own = {"url": f"{url}/v1", "model": "judge-1", "rubric": RUBRIC, "explain": False, "concurrency": 1}
    return {"name": "judge:rating", "part": "judge", "time_limit": 999, "settings": {**own, **QUICK, **settings}}


def rollout(response: str, *turns: tuple[str, str], **columns: object) -> Rollout:
    messages = [{"role": role, "content": text} for role, text in [*turns, ("user", "How?")]]
    return Rollout(
        prompt=make_prompt(byte_tokenizer(), messages, columns),
        sample_index=0,
        response_ids=(5, 6, 7),
        rollout_logprobs=(-1.0, -1.0, -1.0),
        finish_reason="stop",
        response=response,
        weight_version=0,
    )


def scored(function: dict[str, object], *batches: list[Rollout], **execution: object) -> list[list]:
    """What an actor with this function says of each batch, one call after the other."""
    reward = RewardConfig.model_validate({"functions": [function], "execution": execution})
    actor = RewardModelActor(model=ModelConfig(), reward=reward)
    try:
        actor.setup({})
        return [actor.score(batch) for batch in batches]
    finally:
        actor.close()


def by_length(body: dict) -> Planted:
    return Planted({"scores": [float(len(response)) for response in body["responses"]]})


def verdict(body: dict) -> Planted:
    """A judge that counts the letters of an answer, at 100 and 7 tokens a time."""
    texts = json.loads(body["messages"][1]["content"].split("\n")[0])
    content = json.dumps({"score": min(10, len(texts["answer"]))}) if texts["answer"] != "mute" else "hm"
    return Planted(
        {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7},
        }
    )


def test_a_server_scores_by_columns_and_conversation_and_its_requests_are_counted():
    turns = (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"))
    with planted_server(answer=by_length) as server:
        function = remote(server.url, columns=["topic", "prompt_messages"])
        answers = [rollout("a", *turns, topic=3), rollout("bb", topic=4), rollout("ccc", topic=5)]
        first, second = scored(function, answers, answers[:1], samples_per_call=2)
    assert [score.total for score in first + second] == [1.0, 2.0, 3.0, 1.0]
    bodies = [body for _, _, body in server.seen]
    assert [len(body["responses"]) for body in bodies] == [2, 1, 1]
    assert bodies[0]["columns"]["topic"] == [3, 4]
    assert [m["role"] for m in bodies[0]["columns"]["prompt_messages"][0]] == ["system", "user", "assistant", "user"]
    metrics = score_metrics(first)
    assert (metrics["reward/far/request_count"], metrics["reward/far/retry_count"]) == (2, 0)
    assert score_metrics(second)["reward/far/request_count"] == 1  # since the last call, not since the start


def test_counts_add_up_over_processes_and_actors():
    with planted_server(answer=verdict) as server:
        answers = [rollout("x" * n) for n in range(1, 7)]
        whole = scored(judge(server.url), answers, samples_per_call=1, num_workers=3)[0]
        shards = [scored(judge(server.url), shard)[0] for shard in (answers[:2], answers[2:])]
    assert [score.total for score in whole] == [1, 2, 3, 4, 5, 6]
    for scores in (whole, shards[0] + shards[1]):
        metrics = score_metrics(scores)
        assert metrics["reward/judge/request_count"] == 6
        assert metrics["reward/judge/prompt_token_count"] == 600
        assert metrics["reward/judge/completion_token_count"] == 42
        assert metrics["reward/judge/cache_hit_count"] == 0
    assert len(server.seen) == 12


def test_a_judge_sees_the_conversation_and_the_right_answer_and_remembers(tmp_path):
    cache = tmp_path / "cache"
    asked = rollout("abcd", ("user", "Hello"), ("assistant", "Hi"), reference="right")
    with planted_server(answer=verdict) as server:
        first, second = scored(judge(server.url, cache=str(cache)), [asked, rollout("mute")], [asked])
    shown = json.loads(server.seen[0][2]["messages"][1]["content"].split("\n")[0])
    assert shown == {
        "earlier_turns": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
        "question": "How?",
        "answer": "abcd",
        "right_answer": "right",
    }
    assert [score.total for score in first + second] == [4.0, None, 4.0]
    metrics = score_metrics(first)
    # One answer, and one that is asked about twice and says nothing that counts.
    assert (metrics["reward/judge/request_count"], metrics["reward/judge/asked_again_count"]) == (3, 1)
    assert metrics["reward/unscored/not_json"] == 1
    assert first[1].failures["judge"] == "not_json: no verdict in 2 tries"
    again = score_metrics(second)
    assert (again["reward/judge/request_count"], again["reward/judge/cache_hit_count"]) == (0, 1)


FAULTS = {
    "500": (Planted(status=500), "unavailable", 2),
    "hangs up": (Planted(silent=True), "unavailable", 2),
    "401": (Planted(status=401), "refused", 1),
    "redirect": (Planted(status=307, headers={"Location": "/2"}), "refused", 1),
    "stops": (Planted(b'{"scores": [', length=30, then="hang"), "bad_answer", 1),
    "too large for it": (Planted(status=413), "refused", 4),
    "no JSON": (Planted(b"<html>"), "bad_answer", 4),
    "wrong length": (Planted({"scores": [0.5, 0.5, 0.5, 0.5]}), "bad_answer", 4),
    "not a number": (Planted({"scores": [True]}), "bad_answer", 4),
    "huge": (Planted(b" " * 5000), "bad_answer", 4),
}


@pytest.mark.parametrize(("planted", "kind", "requests"), FAULTS.values(), ids=FAULTS)
def test_no_fault_of_a_server_is_a_number_and_none_is_asked_about_beyond_reason(planted, kind, requests):
    """Three answers: one call, asked again for each alone where one of them may be why, and else not."""
    with planted_server(planted) as server:
        function = remote(server.url, timeout=1.0, max_answer_bytes=4096)
        scores = scored(function, [rollout("canary-a"), rollout("canary-b"), rollout("canary-c")])[0]
    assert [score.total for score in scores] == [None] * 3
    metrics = score_metrics(scores)
    assert metrics[f"reward/unscored/{kind}"] == 3
    assert "reward/mean" not in metrics
    assert len(server.seen) == requests
    assert metrics["reward/far/request_count"] + metrics["reward/far/retry_count"] == requests
    assert all(score.failures["far"].startswith(f"{kind}: http://127.0.0.1") for score in scores)
    assert not any("canary" in score.failures["far"] for score in scores)


def test_a_server_that_is_not_there_costs_every_answer_its_score():
    with planted_server(answer=by_length) as server:
        url = server.url
    scores = scored(remote(url), [rollout("a"), rollout("b")])[0]
    assert score_metrics(scores)["reward/unscored/unavailable"] == 2
    assert "no connection (ConnectionRefusedError) in 2 tries" in scores[0].failures["far"]
    assert score_metrics(scored(judge(url), [rollout("a"), rollout("b")])[0])["reward/unscored/unavailable"] == 2


def test_one_answer_that_a_server_cannot_read_costs_the_others_nothing():
    def picky(body: dict) -> Planted:
        return Planted(status=400) if "odd" in body["responses"] else by_length(body)

    with planted_server(answer=picky) as server:
        scores = scored(remote(server.url), [rollout("a"), rollout("odd"), rollout("ccc")])[0]
    assert [score.total for score in scores] == [1.0, None, 3.0]
    assert scores[1].failures["far"].startswith("refused: ")
    assert score_metrics(scores)["reward/far/request_count"] == 4


@pytest.mark.parametrize(
    ("planted", "kind", "requests"),
    [
        (Planted(status=500), "unavailable", 2),
        (Planted(status=401), "refused", 1),
        (Planted({"choices": []}), "bad_answer", 3),
    ],
)
def test_a_judge_that_is_gone_is_not_asked_for_every_answer(planted, kind, requests):
    with planted_server(planted) as server:
        scores = scored(judge(server.url), [rollout("a"), rollout("b"), rollout("c")])[0]
    assert score_metrics(scores)[f"reward/unscored/{kind}"] == 3
    assert len(server.seen) == requests


def test_a_token_comes_from_its_file_alone(tmp_path, monkeypatch):
    token = tmp_path / "token"
    token.write_text(f"{SECRET}\n")
    token.chmod(0o600)
    with planted_server(answer=by_length) as server:
        scores = scored(remote(server.url, token_file=str(token)), [rollout("a")])[0]
    assert scores[0].total == 1.0
    assert server.seen[0][1]["Authorization"] == f"Bearer {SECRET}"
    monkeypatch.setenv("REWARD_TOKEN", SECRET)
    with pytest.raises(ValueError, match="got a setting 'token_env' of remote:score, expected one of"):
        scored(remote(server.url, token_env="REWARD_TOKEN"), [rollout("a")])


def refusal(function: dict[str, object], **columns: object) -> str:
    """Said before an actor starts; nobody is asked."""
    with planted_server(answer=by_length) as server:
        text = json.dumps(function).replace("URL", server.url)
        reward = RewardConfig.model_validate({"functions": [json.loads(text)]})
        with pytest.raises(ValueError) as refused:
            check_reward_functions(reward, [Prompt(id="0", messages=(), prompt_ids=(), columns=columns)])
        assert server.seen == []
    return str(refused.value)


def test_settings_are_refused_before_anything_starts(tmp_path):
    token = tmp_path / "token"
    token.write_text(SECRET)
    token.chmod(0o644)
    said = refusal(remote("URL", token_file=str(token)))
    assert f"token file {token}: got mode 0644, expected 0600: others can read it; run chmod 600 on it" in said
    assert SECRET not in said
    assert "got none (No such file or directory), expected a file" in refusal(
        remote("URL", token_file=str(tmp_path / "none"))
    )
    assert "remote.url: got scheme '' and host None, expected https://" in refusal({"name": "remote:score"})
    assert "remote.url: got http to example.com, expected https" in refusal(remote("http://example.com/score"))
    assert "got a setting 'retry' of remote:score, " in (text := refusal(remote("URL", retry=1)))
    assert "did you mean 'retries'?" in text
    assert "got retries: '1' as a setting of remote:score, expected int" in refusal(remote("URL", retries="1"))
    assert "got timeout 0, retries 1" in refusal(remote("URL", timeout=0.0))
    assert (
        "got remote:score with a column 'topics' to read, expected one of ['finish_reasons', 'lengths', "
        in refusal(remote("URL", columns=["topics"]), topic=1)
    )
    assert "scores from 1 to 10 and a rubric of 0 characters" in refusal(judge("URL", rubric=""))
    assert "scores from 5 to 5" in refusal(judge("URL", low=5, high=5))
    assert "judge: got model ''" in refusal(judge("URL", model=""))
    (tmp_path / "file").write_text("")
    assert f"judge.cache: got '{tmp_path}/file'" in refusal(judge("URL", cache=str(tmp_path / "file")))
    assert "got a column 'prompt_messages' in the data" in refusal(remote("URL"), prompt_messages=1)


def check(function: dict[str, object]) -> None:
    check_reward_functions(RewardConfig.model_validate({"functions": [function]}), [])


def test_a_time_limit_shorter_than_what_the_client_may_take_is_refused(tmp_path):
    far = {"name": "remote:score", "settings": {"url": "http://127.0.0.1:1/score"}}
    check({**far, "time_limit": 40})  # three tries of 10 s, two waits of 5 s
    with pytest.raises(ValueError, match=r"got a time_limit of 39\.9 s for remote:score, .* 40 s: .*; raise"):
        check({**far, "time_limit": 39.9})
    with pytest.raises(ValueError, match=r"got a time_limit of 10 s for remote:score, expected at least 40 s"):
        check(far)
    settings = {"url": "http://127.0.0.1:1/v1", "model": "m", "rubric": RUBRIC, "cache": str(tmp_path / "new")}
    near = {"name": "judge:rating", "settings": settings, "samples_per_call": 9}
    # 70 s a request; nine answers, eight at a time, two tries each, and one request to find out about schemas.
    check({**near, "time_limit": 350})
    with pytest.raises(ValueError, match=r"for judge:rating, expected at least 350 s: so long a call for 9 answers"):
        check({**near, "time_limit": 349})
    assert not (tmp_path / "new").exists()


def loop_of(tiny: Path, folder: Path, function: dict[str, object], **reward: object) -> Loop:
    return Loop(tiny, folder, train_ppo, reward={"functions": [function], **reward})


def test_a_step_of_ppo_by_a_server_and_by_a_judge(tiny, tmp_path):
    with planted_server(answer=by_length) as server:
        loop = loop_of(tiny, tmp_path / "remote", remote(server.url))
        loop.up_to(1)
        loop.stack.close()
    (row,) = loop.metrics()
    rollouts = [json.loads(line) for line in loop.directory.rollouts.read_text().splitlines()]
    assert [one["score"] for one in rollouts] == [float(len(one["response"])) for one in rollouts]
    assert row["reward/mean"] == pytest.approx(sum(one["score"] for one in rollouts) / 4)
    assert (row["reward/far/request_count"], row["reward/far/unscored_count"]) == (1, 0)
    with planted_server(answer=verdict) as server:
        loop = loop_of(tiny, tmp_path / "judge", judge(server.url))
        loop.up_to(1)
        loop.stack.close()
    (row,) = loop.metrics()
    assert (row["reward/judge/request_count"], row["reward/judge/prompt_token_count"]) == (4, 400)


@pytest.mark.parametrize("planted", [Planted(status=500), Planted({"scores": [0.5] * 9})], ids=["500", "wrong length"])
def test_a_server_that_fails_stops_a_step_beyond_the_budget_and_not_below(tiny, tmp_path, planted):
    with planted_server(planted) as server:
        loop = loop_of(tiny, tmp_path / "strict", remote(server.url))
        with pytest.raises(RuntimeError, match=r"got 4 of 4 answers without a score \(4 (unavailable|bad_answer); "):
            loop.up_to(1)
        loop.stack.close()
        assert loop.run.store.complete() == []
    with planted_server(Planted({"scores": [0.5]}), planted) as server:
        one_by_one = {**remote(server.url), "samples_per_call": 1}
        loop = loop_of(tiny, tmp_path / "lenient", one_by_one, max_unscorable=0.75)
        loop.up_to(1)
        loop.stack.close()
    (row,) = loop.metrics()
    assert (row["reward/mean"], row["reward/far/unscored_count"]) == (0.5, 3)
    kinds = {name: number for name, number in row.items() if name.startswith("reward/unscored/")}
    assert list(kinds.values()) == [3]


def test_a_served_model_scores_a_step_as_the_hosted_one_does(tiny, tmp_path):
    """`python -m rewards.serve` behind a token, two processes that ask it, and the same model in the actor."""
    pytest.importorskip("fastapi")
    token = tmp_path / "token"
    token.write_text(SECRET)
    token.chmod(0o600)
    with reward_server(tiny / "reward", "--token-file", str(token)) as served:
        function = remote(f"{served.url}/score", token_file=str(token), timeout=12.0, retries=0)
        reward = {
            "model": str(tiny / "reward"),
            "functions": [{**function, "samples_per_call": 2}],
            "execution": {"num_workers": 2},
        }
        loop = Loop(tiny, tmp_path / "run", train_ppo, reward=reward)
        loop.up_to(1)
        loop.stack.close()
    (row,) = loop.metrics()
    parts = [json.loads(line)["parts"] for line in loop.directory.rollouts.read_text().splitlines()]
    assert len(parts) == 4
    assert [part["far"] for part in parts] == pytest.approx([part["reward_model"] for part in parts], abs=1e-5)
    assert (row["reward/far/request_count"], row["reward/far/unscored_count"]) == (2, 0)
    assert SECRET not in served.log
