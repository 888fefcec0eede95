"""The sampler: an engine with a copy of the weights of its own, or the policy's when colocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.engine_pool import Capacity
from actors.engines import EngineKind, RolloutEngine, SamplingSettings, choose_engine
from actors.engines.transformers import TransformersEngine
from actors.loading import causal_model
from actors.policy import PolicyActor
from actors.weight_routes import Rendezvous, Whereabouts, whereabouts
from actors.weight_sync import AdapterUpdate, Probe, SyncKind, WeightBucket, check_gap
from actors.worker import Actor
from alignment.config import ModelConfig, RolloutConfig
from alignment.data.chat import decode, eos_ids_of_model, load_tokenizer, single_token
from alignment.generation import sampling_seed
from alignment.types import Prompt, Rollout

CPU_CACHE_GB = 1.0
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
        adapter_rank: int = 0,
    ) -> None:
        """`engine`: None takes what `rollout.engine` names. `adapter_rank`: the policy's, 0 without an adapter."""
        self.model_path, self.model_config, self.config = model_path, model, rollout
        self.seed, self.device, self.tensor_parallel_size = seed, device, tensor_parallel_size
        self.engine_kind = engine or choose_engine(rollout.engine)
        if self.engine_kind == "transformers" and tensor_parallel_size > 1:
            raise ValueError(
                f"rollout.tensor_parallel_size: got {tensor_parallel_size} for the transformers engine, expected 1; "
                "set rollout.engine: vllm, or raise num_engines in the cluster YAML instead"
            )
        self.adapter_rank = 0 if rollout.lora_sync == "merged" else adapter_rank

    def setup(self, peers: Mapping[str, Actor]) -> None:
        policy = peers.get("policy")
        self.policy = policy if isinstance(policy, PolicyActor) else None
        self.engine: RolloutEngine = self._vllm() if self.engine_kind == "vllm" else self._transformers()
        self.tokenizer = load_tokenizer(self.model_path, self.model_config.revision)
        self.stop_ids: frozenset[int] = frozenset()
        if not self.config.ignore_eos:
            ends = eos_ids_of_model(self.tokenizer, self.model_path, self.model_config.revision)
            self.stop_ids = ends | {single_token(self.tokenizer, stop) for stop in self.config.stop}

    def _transformers(self) -> TransformersEngine:
        if self.policy is not None:
            model = self.policy.model
        else:
            model = causal_model(self.model_path, self.model_config, self.device, frozen=True)
        return TransformersEngine(model, max_batch=self.config.max_batch)

    def _vllm(self) -> RolloutEngine:
        from actors.engines.vllm import VllmEngine

        settings = self.config.vllm
        cache = CPU_CACHE_GB if settings.kv_cache_gb is None and self.device == "cpu" else settings.kv_cache_gb
        return VllmEngine(
            self.model_path,
            dtype=self.model_config.dtype,
            revision=self.model_config.revision,
            device=self.device,
            max_batch=self.config.max_batch,
            max_model_len=settings.max_model_len,
            kv_cache_gb=cache,
            memory_share=settings.memory_share,
            eager=settings.eager,
            tensor_parallel_size=self.tensor_parallel_size,
            adapter_rank=self.adapter_rank,
        )

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
        self.engine.begin_sync(version=version, buckets=buckets)

    def receive_bucket(self, bucket: WeightBucket) -> None:
        """Take some weights over. Raises RuntimeError when a byte differs from what was sent."""
        self.engine.receive(bucket)

    def finish_sync(self, probe: Probe, *, version: int) -> int:
        """Sample from the new weights from now on. Raises RuntimeError when some are missing or compute otherwise."""
        self.engine.finish_sync(version=version)
        return self.check_probe(probe)

    def receive_adapter(self, update: AdapterUpdate) -> int:
        """Sample with this adapter from now on. Raises RuntimeError when a byte differs from what was sent."""
        return self.engine.receive_adapter(update)

    def check_probe(self, probe: Probe) -> int:
        """The version that samples. Raises RuntimeError when it computes something else than the trainer's."""
        version = self.engine.weight_version
        if version != probe.version:
            raise RuntimeError(f"weight sync: got version {version} in the engine, expected {probe.version}")
        check_gap(
            self.engine.probe_logprobs(probe.ids),
            probe.logprobs,
            limit=self.config.probe_gap_limit or PROBE_GAP_LIMIT[self.model_config.dtype],
            what=f"weight sync of version {version}, probe prompt",
        )
        return version

    def follow(self, *, version: int) -> int:
        """Take the weights of the policy in this process: the same memory, or a copy."""
        if self.policy is None:
            raise RuntimeError("got follow() on an engine without the policy beside it, expected a weight sync")
        if isinstance(self.engine, TransformersEngine):
            return self.engine.follow(version=version)
        if self.engine.sync_kind == "adapter":
            self.receive_adapter(self.policy.export_adapter(version=version))
            return self.check_probe(self.policy.probe(version=version))
        whole = self.engine.sync_kind == "whole"
        buckets = self.policy.plan_sync(whole=whole)
        self.begin_sync(version=version, buckets=buckets)
        for index in range(buckets):
            self.receive_bucket(
                self.policy.export_bucket(version=version, index=index, whole=whole, route="same_process")
            )
        return self.finish_sync(self.policy.probe(version=version), version=version)

    def sleep(self, *, discard_weights: bool = False) -> int:
        """Free the device for the update; returns the bytes freed there. With `discard_weights` a sync must follow."""
        return self.engine.sleep(discard_weights=discard_weights)

    def wake(self) -> None:
        self.engine.wake()
