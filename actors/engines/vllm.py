"""The vLLM engine, in this process: continuous batching over a paged cache, weights through its own interface."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.engines import vllm_compat as compat
from actors.engines.base import SamplingSettings
from actors.rendezvous import Rendezvous
from actors.weight_sync import AdapterUpdate, SyncKind, SyncState, WeightBucket, unpack_adapter
from alignment.generation import Sample

log = logging.getLogger(__name__)


class VllmEngine:
    """One `vllm.LLM`. Samples depend on prompt and seed, up to rounding between batch shapes."""

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        revision: str | None = None,
        device: str = "cpu",
        max_batch: int = 64,
        max_model_len: int | None = None,
        kv_cache_gb: float | None = None,
        memory_share: float = 0.9,
        eager: bool | None = None,
        tensor_parallel_size: int = 1,
        adapter_rank: int = 0,
        batch_invariant: bool = False,
    ) -> None:
        """`adapter_rank`: above 0, syncs carry adapters of at most this rank instead of the model."""
        compat.release()
        compat.prepare_process(batch_invariant=batch_invariant and device != "cpu")
        from vllm import LLM

        from actors.engines.vllm_transfer import BACKEND, EXTENSION

        on_cpu = device == "cpu"
        self.device = device
        self._sync = SyncState()
        arguments: dict[str, Any] = {
            "model": model_path,
            "revision": revision,
            "tokenizer_revision": revision,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": max_batch,
            "enforce_eager": on_cpu if eager is None else eager,
            "tensor_parallel_size": tensor_parallel_size,
            # Left to itself, vLLM would look for the other GPUs in the placement group, where this process has them.
            "distributed_executor_backend": "mp" if tensor_parallel_size > 1 else None,
            # The sampling defaults that some model folders bring would cut the support.
            "generation_config": "vllm",
            # After temperature: what the importance ratio is taken against.
            "logprobs_mode": "processed_logprobs",
            "weight_transfer_config": {"backend": BACKEND},
            "worker_extension_cls": EXTENSION,
            "enable_sleep_mode": not on_cpu,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        memory = compat.memory_arguments(device, kv_cache_gb, memory_share)
        self.llm: Any = LLM(**arguments, **memory, **compat.lora_arguments(adapter_rank))
        self.llm.init_weight_transfer_engine({"init_info": {}})
        compat.check_head_size(self.llm, device)
        compat.set_version(self.llm, 0)
        self.max_model_len = int(self.llm.llm_engine.model_config.max_model_len)
        # Fused layers (q, k and v in one matrix) are rebuilt from all their parts or not at all.
        self.sync_kind: SyncKind = "adapter" if adapter_rank else "whole"
        self._syncing = False
        self._adapter: Any = None

    @property
    def weight_version(self) -> int:
        return self._sync.version

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: Sequence[SamplingSettings]
    ) -> list[Sample]:
        """One sample per prompt. A greedy sample's log-probabilities are at temperature 1."""
        version = self.weight_version  # refuses torn weights
        for prompt, setting in zip(prompts, settings, strict=True):
            if len(prompt) + setting.max_new_tokens > self.max_model_len:
                raise ValueError(
                    f"rollout: got a prompt of {len(prompt)} tokens and max_new_tokens={setting.max_new_tokens}, "
                    f"expected at most {self.max_model_len} together; raise rollout.vllm.max_model_len, or shorten"
                )
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [sampling_params(setting, seed) for setting, seed in zip(settings, seeds, strict=True)],
            use_tqdm=False,
            lora_request=self._adapter,
        )
        return [self._sample(output.outputs[0], version) for output in outputs]

    def _sample(self, completion: Any, version: int) -> Sample:
        used = compat.versions_of(completion)
        if used is not None and used != {str(version)}:
            raise RuntimeError(f"rollout: got an answer sampled by weight versions {sorted(used)}, expected {version}")
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"rollout: got finish reason {completion.finish_reason!r}, expected stop or length")
        ids = tuple(completion.token_ids)
        return Sample(
            response_ids=ids,
            rollout_logprobs=tuple(
                float(position[token].logprob) for token, position in zip(ids, completion.logprobs, strict=True)
            ),
            finish_reason=completion.finish_reason,
        )

    def begin_sync(self, *, version: int, buckets: int) -> None:
        if self._syncing:
            self.llm.collective_rpc("abandon_weight_update")
        self._sync.begin(version, buckets)
        self._syncing = True
        compat.start_weight_update(self.llm)

    def join(self, rendezvous: Rendezvous, *, first_rank: int) -> None:
        """Take part in the broadcasts of a group; worker i has rank `first_rank` + i."""
        info = {"rendezvous": asdict(rendezvous), "first_rank": first_rank}
        self.llm.init_weight_transfer_engine({"init_info": info})

    def receive(self, bucket: WeightBucket) -> None:
        from actors.engines.vllm_transfer import described

        with described(bucket) as info:
            self.llm.update_weights({"update_info": info})
        self._sync.received(bucket)

    def finish_sync(self, *, version: int) -> int:
        self._sync.complete(version)
        compat.finish_weight_update(self.llm, version)
        self._syncing = False
        self._forget_cached_prompts()
        self._sync.end(version)
        return version

    def receive_adapter(self, update: AdapterUpdate) -> int:
        """Load an adapter, by way of two files since vLLM takes no other, and drop the one before."""
        from vllm.lora.request import LoRARequest

        self._sync.begin(update.version, 1)
        old, number = self._adapter, update.version + 1
        with tempfile.TemporaryDirectory(prefix="raylign-adapter-") as folder:
            unpack_adapter(update, Path(folder))
            if old is not None:
                self.llm.llm_engine.remove_lora(old.lora_int_id)
            self._adapter = LoRARequest(f"policy-{update.version}", number, folder)
            loaded = self.llm.llm_engine.add_lora(self._adapter)
        if not loaded or self.llm.llm_engine.list_loras() != {number}:
            raise RuntimeError(
                f"weight sync of version {update.version}: got adapters {self.llm.llm_engine.list_loras()} in vLLM, "
                f"expected {number} alone"
            )
        compat.set_version(self.llm, update.version)
        self._forget_cached_prompts()
        self._sync.end(update.version)
        return update.version

    def _forget_cached_prompts(self) -> None:
        """Keys and values of older weights must not serve a prompt that comes back."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("rollout: got a prefix cache that vLLM did not reset, expected no request under way")

    def probe_logprobs(self, ids: Sequence[int]) -> list[float]:
        from vllm import SamplingParams

        _ = self.weight_version
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self.llm.generate(
            [{"prompt_token_ids": list(ids)}], [params], use_tqdm=False, lora_request=self._adapter
        )
        return [float(output.prompt_logprobs[t][token].logprob) for t, token in enumerate(ids) if t > 0]

    def sleep(self, *, discard_weights: bool = False) -> int:
        """Weights go to host memory, or nowhere when a sync follows anyway; the cache is dropped.

        vLLM's CPU backend keeps everything: there 0 bytes are freed.
        """
        if discard_weights and self.sync_kind == "adapter":
            raise ValueError(
                "rollout: got a sleep that discards the weights of an engine that is sent adapters only, expected one "
                "that keeps them; set rollout.lora_sync: merged, or discard nothing"
            )
        before = self._free_bytes()
        self.llm.sleep(level=2 if discard_weights else 1)
        if discard_weights and self.device != "cpu":
            self._sync.forget()
        freed = self._free_bytes() - before
        log.info("rollout engine sleeps: %.2f GB freed on %s", freed / 1e9, self.device)
        return freed

    def wake(self) -> None:
        self.llm.wake_up()
        self._forget_cached_prompts()

    def _free_bytes(self) -> int:
        import torch

        return int(torch.cuda.mem_get_info()[0]) if self.device != "cpu" else 0

    def close(self) -> None:
        compat.shut_down(self.llm)


def sampling_params(setting: SamplingSettings, seed: int) -> Any:
    """vLLM's form of our settings. Only `stop_ids` end a response: the engine's own idea of EOS is switched off."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0 if setting.greedy else setting.temperature,
        seed=seed,
        max_tokens=setting.max_new_tokens,
        stop_token_ids=sorted(setting.stop_ids),
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )
