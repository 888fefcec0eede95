"""A language model that is trained on data: what the actors of all such stages share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.learning import LearningActor
from actors.loading import causal_model, save_trained
from actors.sending import SendingActor
from actors.weight_sender import WeightSender
from actors.worker import Actor
from alignment import adapters
from alignment.data.chat import decode, eos_ids_of_model, load_tokenizer
from alignment.generation import HELD_OUT_STEP, generate, sampling_seed
from alignment.models import HfModel
from alignment.quantization import num_weights, stored_bytes
from alignment.types import Prompt, Rollout


class FineTunedActor(LearningActor, SendingActor):
    """The policy, in full or by an adapter. A kind of it says in `make_learner` what it learns from."""

    role = "policy"

    def setup(self, peers: Mapping[str, Actor]) -> None:
        super().setup(peers)
        self.sender = WeightSender(self.model.model, self.device, leads=self.ranks.rank == 0)

    def load_model(self) -> HfModel:
        quantization = self.training.adapter.quantization
        return causal_model(self.model_path, self.model_config, self.device, quantization=quantization)

    def respond(self, prompts: Sequence[Prompt], *, max_new_tokens: int, seed: int | None = None) -> list[Rollout]:
        """An answer to each prompt: the most likely one, token by token, or with a seed a sample at temperature 1,
        whose random numbers go by seed and prompt. The whole model must be here."""
        tokenizer = load_tokenizer(self.model_path, self.model_config.revision)
        samples = generate(
            self.model,
            [prompt.prompt_ids for prompt in prompts],
            [sampling_seed(seed or 0, prompt.id, HELD_OUT_STEP, 0) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            temperature=1.0,
            stop_ids=eos_ids_of_model(tokenizer, self.model_path, self.model_config.revision),
            greedy=seed is None,
        )
        return [
            Rollout(
                prompt=prompt,
                sample_index=0,
                response_ids=sample.response_ids,
                rollout_logprobs=sample.rollout_logprobs,
                finish_reason=sample.finish_reason,
                response=decode(tokenizer, sample.response_ids),
                weight_version=0,
            )
            for prompt, sample in zip(prompts, samples, strict=True)
        ]

    def num_parameters(self) -> dict[str, int]:
        """How many numbers the model has and how many of them are trained, and the bytes that this process holds of
        both."""
        parameters = list(self.model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return {
            "trained": sum(map(num_weights, trained)),
            "all": sum(map(num_weights, parameters)),
            "trained_bytes": sum(map(stored_bytes, trained)),
            "bytes": sum(map(stored_bytes, parameters)),
        }

    def save(self, folder: Path) -> None:
        """As `LearningActor` does it, the tokenizer beside full weights."""
        tokenizer = load_tokenizer(self.model_path, self.model_config.revision)
        save_trained(self.model, self.learner, folder, self.model_path, tokenizer)

    def export(self, folder: Path) -> None:
        """The finished model: a plain Hugging Face folder, the adapter beside it when there is one. An adapter that
        cannot be merged is all there is of it."""
        write = self.ranks.rank == 0
        tokenizer = load_tokenizer(self.model_path, self.model_config.revision)
        if not adapters.mergeable(self.training.adapter.type):
            adapters.export_adapter(
                self.model.model, folder / "adapter", base=self.model_path, tokenizer=tokenizer, write=write
            )
            return
        adapters.export_merged(self.model.model, folder, tokenizer, write=write)
        if adapters.has_adapter(self.model.model):
            adapters.save_adapter(self.model.model, folder / "adapter", base=self.model_path, write=write)
