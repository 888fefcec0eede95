"""The vLLM engine itself, on a tiny random model and on a real small one; no part of vLLM is replaced."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import write_tiny_model

from actors.engines import SamplingSettings
from actors.engines.transformers import TransformersEngine, probe_logprobs
from actors.rendezvous import open_rendezvous
from actors.weight_routes import BroadcastGroup
from actors.weight_sync import check_gap, pack_block, pack_bucket, plan_buckets, probe_ids
from alignment import adapters
from alignment.models import HfModel, load_causal_lm

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from actors.engines.vllm import VllmEngine  # noqa: E402

FREE = SamplingSettings(max_new_tokens=12, temperature=1.0, stop_ids=frozenset())


def trainer(path: str) -> HfModel:
    return load_causal_lm(path, dtype=torch.float32, attention="sdpa", revision=None, device="cpu")


def buckets(model: HfModel, version: int, limit: int = 20_000):
    """The policy's side of a sync, in buckets small enough that even a tiny model needs several."""
    sizes = adapters.merged_sizes(model.model, whole=True)
    names = list(sizes)
    for index, part in enumerate(plan_buckets(list(sizes.values()), limit=limit)):
        chosen = set(names[part.start : part.stop])
        yield pack_bucket(adapters.merged_weights(model.model, chosen, whole=True), version=version, index=index)


def send(engine, model: HfModel, version: int, limit: int = 20_000) -> None:
    packed = list(buckets(model, version, limit))
    engine.begin_sync(version=version, buckets=len(packed))
    for bucket in packed:
        engine.receive(bucket)
    assert engine.finish_sync(version=version) == version


@torch.no_grad()
def change(model: HfModel, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def trainer_logprobs(model: HfModel, prompt, sample, temperature: float = 1.0) -> list[float]:
    from alignment.logprobs import token_logprobs

    ids = torch.tensor([[*prompt, *sample.response_ids]])
    with torch.no_grad():
        logits = model.head(model.hidden(ids, torch.ones_like(ids, dtype=torch.bool)))
    return token_logprobs(logits, ids, temperature=temperature)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """The tiny model with heads of 32: vLLM's CPU attention has no kernel for narrower ones."""
    return str(write_tiny_model(tmp_path_factory.mktemp("vllm") / "model", hidden_size=64, num_attention_heads=2))


@pytest.fixture(scope="module")
def engine(folder):
    engine = VllmEngine(folder, dtype="float32", max_batch=32, max_model_len=256, kv_cache_gb=0.1)
    yield engine
    engine.close()


PROMPTS = [[5 + i, 40 + i, 80, 120, *range(20, 20 + i)] for i in range(24)]
SEEDS = [1000 + i for i in range(24)]


def sample(engine, prompts=PROMPTS, seeds=SEEDS, setting=FREE):
    return engine.generate(prompts, seeds, [setting] * len(prompts))


def test_the_same_seeds_give_the_same_samples_whatever_the_batch(engine):
    together = sample(engine)
    alone = [sample(engine, [p], [s])[0] for p, s in zip(PROMPTS[:6], SEEDS[:6], strict=True)]
    assert [s.response_ids for s in alone] == [s.response_ids for s in together[:6]]
    backwards = sample(engine, PROMPTS[::-1], SEEDS[::-1])[::-1]
    assert [s.response_ids for s in backwards] == [s.response_ids for s in together]


def test_another_seed_gives_another_sample(engine):
    prompt = PROMPTS[0]
    answers = {s.response_ids for s in sample(engine, [prompt] * 8, list(range(8)))}
    assert len(answers) == 8


def test_samples_follow_the_distribution(engine, folder):
    """First tokens of 2000 seeds against the trainer's probabilities: a total variation beyond chance fails."""
    prompt, draws = PROMPTS[3], 2000
    one = dataclasses.replace(FREE, max_new_tokens=1)
    got = torch.zeros(259)
    for s in sample(engine, [prompt] * draws, list(range(draws)), one):
        got[s.response_ids[0]] += 1 / draws
    model = trainer(folder)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        p = model.head(model.hidden(ids, torch.ones_like(ids, dtype=torch.bool)))[0, -1].softmax(-1)
    # E|got - p| is at most sqrt(p (1 - p) / draws) per token; the sum is far less spread than its mean.
    expected = (p * (1 - p) / draws).sqrt().sum() / 2
    assert float((got - p).abs().sum() / 2) < float(expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_logprobs_are_the_trainers_at_the_sampling_temperature(engine, folder, temperature):
    setting = dataclasses.replace(FREE, temperature=temperature)
    model = trainer(folder)
    for prompt, s in zip(PROMPTS[:4], sample(engine, PROMPTS[:4], SEEDS[:4], setting), strict=True):
        check_gap(s.rollout_logprobs, trainer_logprobs(model, prompt, s, temperature), limit=1e-4, what="t")


def test_a_wrong_temperature_is_seen(engine, folder):
    setting = dataclasses.replace(FREE, temperature=0.7)
    (s,) = sample(engine, PROMPTS[:1], SEEDS[:1], setting)
    with pytest.raises(RuntimeError, match="another temperature"):
        check_gap(s.rollout_logprobs, trainer_logprobs(trainer(folder), PROMPTS[0], s, 1.0), limit=0.05, what="t")


def test_stop_ids_end_a_response_and_belong_to_it(engine):
    free = sample(engine, PROMPTS[:8], SEEDS[:8])
    stop = free[0].response_ids[4]
    stopped = sample(engine, PROMPTS[:8], SEEDS[:8], dataclasses.replace(FREE, stop_ids=frozenset({stop})))
    for a, b in zip(free, stopped, strict=True):
        cut = a.response_ids.index(stop) + 1 if stop in a.response_ids else len(a.response_ids)
        assert b.response_ids == a.response_ids[:cut]
        assert b.finish_reason == ("stop" if stop in a.response_ids else "length")
        assert len(b.rollout_logprobs) == cut


def test_the_models_own_eos_ends_nothing_unless_asked_to(engine):
    """The folder names token 2 as EOS; it is an ordinary token where `stop_ids` is empty."""
    samples = sample(engine, [PROMPTS[0]] * 200, list(range(200)), FREE)
    assert {len(s.response_ids) for s in samples} == {12}
    assert any(2 in s.response_ids[:-1] for s in samples)


def test_limits_are_per_request(engine):
    settings = [dataclasses.replace(FREE, max_new_tokens=n) for n in (1, 5, 12)]
    samples = engine.generate(PROMPTS[:3], SEEDS[:3], settings)
    assert [len(s.response_ids) for s in samples] == [1, 5, 12]
    assert samples[1].response_ids == sample(engine)[1].response_ids[:5]


def test_what_does_not_fit_is_refused(engine):
    with pytest.raises(ValueError, match=r"rollout.vllm.max_model_len"):
        sample(engine, [[7] * 250], [0])


def test_greedy_is_the_argmax(engine, folder):
    (s,) = sample(engine, PROMPTS[:1], [0], dataclasses.replace(FREE, greedy=True))
    embedded = TransformersEngine(trainer(folder), max_batch=4)
    (expected,) = sample(embedded, PROMPTS[:1], [0], dataclasses.replace(FREE, greedy=True))
    assert s.response_ids == expected.response_ids


def test_new_weights_arrive_and_no_stale_cache_serves_them(engine, folder):
    """The same long prompt before and after: its cached keys belong to the old weights."""
    prompt, version = list(range(3, 200)), engine.weight_version
    model = trainer(folder)
    send(engine, model, version + 1)
    before = sample(engine, [prompt], [1])[0]
    assert sample(engine, [prompt], [1])[0] == before  # from the cache
    change(model, 0.05, seed=1)
    send(engine, model, version + 2)
    assert engine.weight_version == version + 2
    after = sample(engine, [prompt], [1])[0]
    assert after.response_ids != before.response_ids
    check_gap(after.rollout_logprobs, trainer_logprobs(model, prompt, after), limit=1e-4, what="after the sync")
    ids = probe_ids(259)
    check_gap(engine.probe_logprobs(ids), probe_logprobs(model, ids), limit=1e-4, what="probe")


def test_a_broadcast_arrives(engine, folder):
    """Over gloo; NCCL is the same group with another backend."""
    model = trainer(folder)
    change(model, 0.02, seed=11)
    rendezvous, store = open_rendezvous("127.0.0.1", world_size=2, backend="gloo")
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(BroadcastGroup, rendezvous, rank=0, store=store)
        engine.join(rendezvous, first_rank=1)
        sender = meeting.result()
        weights = adapters.merged_weights(model.model, whole=True)
        bucket, block = pack_block(weights, version=21, index=0, device="cpu", route="broadcast")
        sending = pool.submit(sender.send, block)
        engine.begin_sync(version=21, buckets=1)
        engine.receive(bucket)
        sending.result()
    engine.finish_sync(version=21)
    ids = probe_ids(model.model.config.vocab_size)
    check_gap(engine.probe_logprobs(ids), probe_logprobs(model, ids), limit=1e-4, what="broadcast")


def test_a_block_of_this_process_arrives(engine, folder):
    model = trainer(folder)
    change(model, 0.02, seed=12)
    weights = adapters.merged_weights(model.model, whole=True)
    engine.begin_sync(version=22, buckets=1)
    engine.receive(pack_bucket(weights, version=22, index=0, route="same_process"))
    engine.finish_sync(version=22)
    ids = probe_ids(model.model.config.vocab_size)
    check_gap(engine.probe_logprobs(ids), probe_logprobs(model, ids), limit=1e-4, what="same process")


def test_old_weights_do_not_pass_the_probe(engine, folder):
    """A sync of weights other than the trainer's: every hash is right, the probe is not."""
    model, ids = trainer(folder), probe_ids(259)
    send(engine, model, 50)
    change(model, 0.01, seed=2)
    with pytest.raises(RuntimeError, match="stale"):
        check_gap(engine.probe_logprobs(ids), probe_logprobs(model, ids), limit=1e-3, what="probe")


def test_a_flipped_byte_fails_the_sync_and_the_next_one_mends_it(engine, folder):
    model = trainer(folder)
    change(model, 0.05, seed=3)
    first, second, *rest = list(buckets(model, 60))
    damaged = second.payload.copy()
    damaged[123] ^= 4
    engine.begin_sync(version=60, buckets=2 + len(rest))
    engine.receive(first)
    with pytest.raises(RuntimeError, match="version 60, bucket 1: got bytes"):
        engine.receive(dataclasses.replace(second, payload=damaged))
    with pytest.raises(RuntimeError, match="expected all of them"):
        sample(engine, PROMPTS[:1], SEEDS[:1])
    send(engine, model, 61)
    ids = probe_ids(259)
    check_gap(engine.probe_logprobs(ids), probe_logprobs(model, ids), limit=1e-4, what="probe")


def test_a_sync_with_a_bucket_missing_fails(engine, folder):
    model = trainer(folder)
    packed = list(buckets(model, 70))
    engine.begin_sync(version=70, buckets=len(packed))
    for bucket in packed[:-1]:
        engine.receive(bucket)
    with pytest.raises(RuntimeError, match=f"got {len(packed) - 1} of {len(packed)} buckets"):
        engine.finish_sync(version=70)
    with pytest.raises(RuntimeError, match="no end"):
        engine.probe_logprobs([1, 2, 3])
    send(engine, model, 71)
    assert engine.weight_version == 71


def test_sleep_and_wake_keep_the_weights_and_drop_the_cache(engine, folder):
    model = trainer(folder)
    send(engine, model, 80)
    before = sample(engine)
    engine.sleep()
    engine.wake()
    assert sample(engine) == before
