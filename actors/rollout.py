"""The sampler: an engine with a copy of the weights of its own, or the policy's when colocated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from actors.engine_pool import Capacity
from actors.engines import EngineKind, RolloutEngine, SamplingSettings, choose_engine
from actors.engines.transformers import TransformersEngine
from actors.engines.vllm_checks import cache_gb, model_length
from actors.listening import require_server
from actors.loading import causal_model
from actors.rendezvous import Rendezvous
from actors.sending import SendingActor
from actors.turns import Turns
from actors.weight_routes import Whereabouts, whereabouts
from actors.weight_sync import AdapterUpdate, Probe, SyncKind, WeightBucket, check_gap
from actors.worker import Actor
from alignment.config import AdapterConfig, ModelConfig, RolloutConfig
from alignment.config.rollout import refuse_adapter_on_other_base
from alignment.data.chat import decode, eos_ids_of_model, load_tokenizer, single_token
from alignment.generation import sampling_seed
from alignment.models import num_positions
from alignment.types import Prompt, Rollout

if TYPE_CHECKING:
    from actors.endpoint import Endpoint

BATCHES_PER_VLLM_SHARE = 4
"""A share ends with the batch running empty; sharing out by less would let that happen more often."""
PROBE_GAP_LIMIT = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
"""Mean |engine - trainer| log-probability that other kernels may cause, by the dtype of the matrix products."""


class RolloutActor(Actor):
    """Answers prompts with the policy version it was last given."""

    role = "rollout"
    peers_needed = ("policy",)

    def __init__(
        self,
        *,
        model_path: str,
        model: ModelConfig,
        rollout: RolloutConfig,
        seed: int,
        device: str = "cpu",
        engine: EngineKind | None = None,
        tensor_parallel_size: int = 1,
        adapter: AdapterConfig | None = None,
        longest: int | None = None,
    ) -> None:
        """
        Args:
            engine: None takes what `rollout.engine` names.
            adapter: the policy's.
            longest: tokens of the longest prompt and answer together; None makes room for what the model can take.
        """
        self.model_path, self.model_config, self.config = model_path, model, rollout
        self.seed, self.device, self.tensor_parallel_size = seed, device, tensor_parallel_size
        self.engine_kind = engine or choose_engine(rollout.engine)
        if self.engine_kind == "transformers" and tensor_parallel_size > 1:
            raise ValueError(
                f"rollout.tensor_parallel_size: got {tensor_parallel_size} for the transformers engine, expected 1; "
                "set rollout.engine: vllm, or raise num_engines in the cluster YAML instead"
            )
        self.longest = longest
        self.adapter_rank = rank_of_sync(rollout, adapter or AdapterConfig(), device)
        self.endpoint: Endpoint | None = None

    def setup(self, peers: Mapping[str, Actor]) -> None:
        self.turns = Turns()
        policy = peers.get("policy")
        self.policy = policy if isinstance(policy, SendingActor) else None
        self._naps = self.policy is not None and self.engine_kind == "vllm"
        self._asleep = self._discarded = False
        self._followed = 0
        self.engine: RolloutEngine = self._vllm() if self.engine_kind == "vllm" else self._transformers()
        self.tokenizer = load_tokenizer(self.model_path, self.model_config.revision)
        self.stop_ids: frozenset[int] = frozenset()
        if not self.config.ignore_eos:
            ends = eos_ids_of_model(self.tokenizer, self.model_path, self.model_config.revision)
            self.stop_ids = ends | {single_token(self.tokenizer, stop) for stop in self.config.stop}
        if self.config.endpoint_port is not None and self.rank == 0:
            self.endpoint = self._open_endpoint(self.config.endpoint_port)

    def _transformers(self) -> TransformersEngine:
        if self.policy is not None:
            model = self.policy.model
        else:
            model = causal_model(self.model_path, self.model_config, self.device, frozen=True)
        return TransformersEngine(model, max_batch=self.config.max_batch)

    def _vllm(self) -> RolloutEngine:
        from transformers import AutoConfig

        from actors.engines.vllm import VllmEngine

        settings = self.config.vllm
        built_for = num_positions(AutoConfig.from_pretrained(self.model_path, revision=self.model_config.revision))
        endpoint = self.config.endpoint_port is not None
        return VllmEngine(
            self.model_path,
            dtype=self.model_config.dtype,
            revision=self.model_config.revision,
            device=self.device,
            max_batch=self.config.max_batch,
            max_model_len=model_length(settings, longest=self.longest, positions=built_for, endpoint=endpoint),
            kv_cache_gb=cache_gb(settings, self.device),
            memory_share=settings.memory_share,
            eager=settings.eager,
            tensor_parallel_size=self.tensor_parallel_size,
            adapter_rank=self.adapter_rank,
            batch_invariant=settings.batch_invariant,
        )

    def _open_endpoint(self, port: int) -> Endpoint:
        """Requests are answered between the run's own calls."""
        if self.policy is not None and isinstance(self.engine, TransformersEngine):
            raise ValueError(
                f"rollout.endpoint_port: got {port} for a sampler that shares the policy's memory, where a request "
                "would meet half an update, expected a sampler with weights of its own; take rollout out of the "
                "policy's group in colocate, or remove the port"
            )
        require_server(port)
        from actors.endpoint import Endpoint, Speaker

        speaker = Speaker(
            self.engine,
            self.turns,
            self.tokenizer,
            stop_ids=self.stop_ids,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            max_batch=self.config.max_batch,
        )
        return Endpoint(port, speaker)

    def close(self) -> None:
        if self.endpoint is not None:
            self.endpoint.close()
            self.endpoint = None
        if hasattr(self, "engine"):  # setup may have failed before there was one
            self.engine.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        num_samples: int = 1,
        greedy: bool = False,
        max_new_tokens: int | None = None,
        sample_indices: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """`num_samples` rollouts per prompt, in prompt order then sample order. The seed of each is its own.

        `sample_indices`: one rollout per prompt instead, sample `sample_indices[i]` of prompt i.
        """
        jobs = [(prompt, index) for prompt in prompts for index in range(num_samples)]
        if sample_indices is not None:
            jobs = list(zip(prompts, sample_indices, strict=True))
        settings = SamplingSettings(
            max_new_tokens=max_new_tokens or self.config.max_new_tokens,
            temperature=self.config.temperature,
            stop_ids=self.stop_ids,
            greedy=greedy,
        )
        with self._awake(), self.turns.run():
            version = self.engine.weight_version
            samples = self.engine.generate(
                [prompt.prompt_ids for prompt, _ in jobs],
                [sampling_seed(self.seed, prompt.id, step, index) for prompt, index in jobs],
                [settings] * len(jobs),
            )
        return [
            Rollout(
                prompt=prompt,
                sample_index=index,
                response_ids=sample.response_ids,
                rollout_logprobs=sample.rollout_logprobs,
                finish_reason=sample.finish_reason,
                response=decode(self.tokenizer, sample.response_ids),
                weight_version=version,
            )
            for (prompt, index), sample in zip(jobs, samples, strict=True)
        ]

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        """Beside the policy, vLLM has the device while it samples and gives it back for the update.

        What follows is a sync, so merged weights are dropped, not saved; should another sampling come first, the
        policy, which has not moved, sends them once more.
        """
        if self._asleep:
            self.wake()
            if self._discarded:
                self.follow(version=self._followed)
        yield
        if self._naps:
            self.sleep(discard_weights=self.engine.sync_kind == "whole")

    def capacity(self) -> Capacity:
        """vLLM refills its batch from what it was sent; the other engine decodes one batch after the other."""
        batches = BATCHES_PER_VLLM_SHARE if self.engine_kind == "vllm" else 1
        return Capacity(sequences=batches * self.config.max_batch, max_new_tokens=self.config.max_new_tokens)

    def sync_kind(self) -> SyncKind:
        return self.engine.sync_kind

    def whereabouts(self) -> Whereabouts:
        return whereabouts(self.device)

    def num_receivers(self) -> int:
        """Processes of this engine that take part in a broadcast."""
        return self.tensor_parallel_size

    def join(self, rendezvous: Rendezvous, *, first_rank: int) -> None:
        """Take part in the policy's broadcasts."""
        self.engine.join(rendezvous, first_rank=first_rank)

    def begin_sync(self, *, version: int, buckets: int) -> None:
        self.turns.hold_off()
        with self.turns.run():
            self.engine.begin_sync(version=version, buckets=buckets)

    def receive_bucket(self, bucket: WeightBucket) -> None:
        """Take some weights over. Raises RuntimeError when a byte differs from what was sent."""
        with self.turns.run():
            self.engine.receive(bucket)

    def finish_sync(self, probe: Probe, *, version: int) -> int:
        """Sample from the new weights from now on. Raises RuntimeError when some are missing or compute otherwise."""
        with self.turns.run():
            self.engine.finish_sync(version=version)
        return self.check_probe(probe)

    def receive_adapter(self, update: AdapterUpdate) -> int:
        """Sample with this adapter from now on. Raises RuntimeError when a byte differs from what was sent."""
        self.turns.hold_off()
        with self.turns.run():
            return self.engine.receive_adapter(update)

    def check_probe(self, probe: Probe) -> int:
        """The version that samples. Raises RuntimeError when it computes something else than the trainer's."""
        with self.turns.run():
            version = self.engine.weight_version
            if version != probe.version:
                raise RuntimeError(f"weight sync: got version {version} in the engine, expected {probe.version}")
            got = self.engine.probe_logprobs(probe.ids)
        check_gap(
            got,
            probe.logprobs,
            limit=self.config.probe_gap_limit or PROBE_GAP_LIMIT[self.model_config.dtype],
            what=f"weight sync of version {version}, probe prompt",
        )
        self.turns.let_in()
        return version

    def follow(self, *, version: int) -> int:
        """Take the weights of the policy in this process: the same memory, or a copy."""
        if self.policy is None:
            raise RuntimeError("got follow() on an engine without the policy beside it, expected a weight sync")
        self._followed = version
        if isinstance(self.engine, TransformersEngine):
            return self.engine.follow(version=version)
        if self._asleep:
            self.wake()
        if self.engine.sync_kind == "adapter":
            update = self.policy.export_adapter(version=version)
            assert update is not None
            self.receive_adapter(update)
            return self.check_probe(self.policy.probe(version=version))
        whole = self.engine.sync_kind == "whole"
        buckets = self.policy.plan_sync(whole=whole)
        self.begin_sync(version=version, buckets=buckets)
        for index in range(buckets):
            bucket = self.policy.export_bucket(version=version, index=index, whole=whole, route="same_process")
            assert bucket is not None
            self.receive_bucket(bucket)
        return self.finish_sync(self.policy.probe(version=version), version=version)

    def sleep(self, *, discard_weights: bool = False) -> int:
        """Free the device for the update; returns the bytes freed there. With `discard_weights` a sync must follow."""
        self.turns.hold_off()
        self._asleep, self._discarded = True, discard_weights
        with self.turns.run():
            return self.engine.sleep(discard_weights=discard_weights)

    def wake(self) -> None:
        with self.turns.run():
            self.engine.wake()
        self._asleep = False
        if not self._discarded:
            self.turns.let_in()


def rank_of_sync(rollout: RolloutConfig, adapter: AdapterConfig, device: str) -> int:
    """The rank of the adapters that vLLM is sent; 0 where it is sent merged weights."""
    refuse_adapter_on_other_base(rollout, adapter)
    if rollout.lora_sync == "auto":
        alone = adapter.served_alone and device != "cpu" and adapter.quantization == "none"
        return adapter.r if alone else 0
    return adapter.r if rollout.lora_sync == "adapter" else 0
