"""A reward model in one process, by torch and transformers alone: texts -> ids -> one number each.

It scores as a run scores with the same folder: the answer is read as a finished turn of the model's own chat
template, up to and with its end token, and what a text spells out of control tokens stays text, so that no answer can
close its turn and speak for somebody else. Rewards import nothing of ours but rewards, so this is written out here;
tests hold it to the ids and scores of the other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewards.last_states import pad, padded_states, pays, takes_trees, tree_states
from rewards.layouts import Ids, Layout, PaddedRows, SharedPrefixes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATISTICS_FILE = "score_statistics.json"
_FIRST = 0xF0000  # private use: one character for each control token that a text spells out
_STAND_IN = re.compile("([\U000f0000-\U000ffffd])")
_MOST = 0xFFFD + 1


class ChatEncoder:
    """Ids of a question and its answer, as the reward model was trained on them."""

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int]) -> None:
        """
        Raises:
            ValueError: no chat template, or one whose answers no EOS closes.
        """
        if not tokenizer.chat_template:
            raise ValueError("reward model: got a tokenizer without chat template, expected one; choose another model")
        self._tokenizer, self._eos_ids = tokenizer, eos_ids
        added = getattr(tokenizer, "added_tokens_decoder", {})
        names = {str(token) for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, names), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.encode("Hello", "Good day.")

    def encode(self, prompt: str, response: str) -> list[int]:
        """Ids of one turn of the user and one of the assistant, ending with the latter's end token.

        Raises:
            ValueError: the template refuses them, closes the answer by no EOS, or does more than append.
        """
        spelt: list[str] = []
        messages = [
            {"role": "user", "content": self._inert(prompt, spelt)},
            {"role": "assistant", "content": self._inert(response, spelt)},
        ]
        question = self._render(messages[:1], add_generation_prompt=True)
        whole = self._render(messages)
        if not whole.startswith(question):
            raise ValueError(
                "reward model: got a chat template that renders a question differently once its answer follows, "
                "expected one that only appends; choose another model"
            )
        answer = self._closed(whole[len(question) :])
        ids, together = self._ids(question, spelt), self._ids(question + answer, spelt)
        # Where a token would straddle the seam, the answer has its own: training starts from the question's ids too.
        return together if together[: len(ids)] == ids else ids + self._ids(answer, spelt)

    def _inert(self, text: str, spelt: list[str]) -> str:
        def stand_in(match: re.Match[str]) -> str:
            spelt.append(match.group())
            if len(spelt) > _MOST:
                raise ValueError(f"reward model: got more than {_MOST} control tokens in a text, expected fewer")
            return chr(_FIRST + len(spelt) - 1)

        # A stand-in's own characters get one as well, so that no text can forge one.
        return re.sub(f"{_STAND_IN.pattern[1:-1]}|{self._control.pattern}", stand_in, text)

    def _render(self, messages: list[dict[str, str]], **settings: bool) -> str:
        import jinja2

        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **settings))
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(
                f"reward model: got a chat template that refuses a question and its answer ({type(error).__name__}), "
                "expected one that takes them; choose another model"
            ) from error

    def _closed(self, turn: str) -> str:
        for match in self._control.finditer(turn):
            if self._tokenizer.convert_tokens_to_ids(match.group()) in self._eos_ids:
                return turn[: match.end()]
        raise ValueError(
            "reward model: got a chat template whose answers no EOS closes, expected its end-of-turn token as "
            "eos_token; correct tokenizer_config.json"
        )

    def _ids(self, text: str, spelt: list[str]) -> list[int]:
        ids: list[int] = []
        for index, piece in enumerate(_STAND_IN.split(text)):
            plain = index % 2 == 1
            said = spelt[ord(piece) - _FIRST] if plain else piece
            if said:
                ids += self._tokenizer(said, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        return ids


class ScalarModel:
    """A sequence-classification model with one label: the number at the last token of each sequence."""

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        standardize: bool = True,
    ) -> None:
        """
        Args:
            path: Hugging Face folder or hub name, weights as safetensors.
            standardize: subtract the mean and divide by the deviation that a run saved with its reward model.

        Raises:
            ValueError: no such model, or one without one trained score head and a chat template.
        """
        from transformers import AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
            self._model = _load(path, revision, DTYPES[dtype]).to(device).eval().requires_grad_(False)
        except OSError as error:
            raise ValueError(
                f"reward model {path!r}: got none that can be loaded ({str(error).splitlines()[0]}), expected a "
                "Hugging Face folder with tokenizer and safetensors; correct the path"
            ) from error
        self.device = torch.device(device)
        self.encoder = ChatEncoder(tokenizer, _eos_ids(tokenizer, path, revision, self._model.config))
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self.num_positions = limit if isinstance(limit, int) and limit > 0 else None
        self.mean, self.std = load_statistics(Path(path)) if standardize else (0.0, 1.0)
        self._shares = takes_trees(self._model)
        self.layout: Layout = SharedPrefixes() if self._shares else PaddedRows()

    def encode(self, prompt: str, response: str) -> list[int] | None:
        """Ids of a question and its answer; None where they are more than the model has positions."""
        ids = self.encoder.encode(prompt, response)
        return ids if self.num_positions is None or len(ids) <= self.num_positions else None

    @torch.inference_mode()
    def score(self, sequences: Sequence[Ids]) -> list[float]:
        """One score per sequence of ids, in one forward."""
        if self._shares and pays(sequences, self._model.config.get_text_config().hidden_size):
            states = tree_states(self._model, sequences)
        else:
            states = padded_states(self._model, *(part.to(self.device) for part in pad(sequences)))
        scores = self._model.score(states).squeeze(-1).float()
        return [(score - self.mean) / self.std for score in scores.tolist()]


def load_statistics(folder: Path) -> tuple[float, float]:
    """Mean and standard deviation of real answers' scores; 0 and 1 where none were saved.

    Raises:
        ValueError: a file that is broken, or numbers that nothing can be standardised with.
    """
    file = folder / STATISTICS_FILE
    if not file.is_file():
        return 0.0, 1.0
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        mean, std = float(saved["mean"]), float(saved["std"])
        broken = not (math.isfinite(mean) and math.isfinite(std) and std > 0)
    except (ValueError, KeyError, TypeError):
        broken = True
    if broken:
        raise ValueError(f"{file}: got no finite mean and std above 0, expected both; train again, or pass --raw")
    return mean, std


def _load(path: str, revision: str | None, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        path,
        revision=revision,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1 or info["missing_keys"]:
        missing = sorted(info["missing_keys"])[:3]
        got = f"no weights for {missing}" if missing else f"a {type(model).__name__} with {model.num_labels} labels"
        raise ValueError(
            f"reward model {path!r}: got {got}, expected a decoder with one label and a trained `score` head; train "
            "one with recipes/reward_model_medical.py"
        )
    return model


def _eos_ids(tokenizer: Any, path: str, revision: str | None, config: Any) -> frozenset[int]:
    """The tokenizer's EOS and those of the generation config, or else of the config: Llama 3 has several."""
    from transformers import GenerationConfig

    with_ends = config
    try:
        with_ends = GenerationConfig.from_pretrained(path, revision=revision or "main")
    except OSError:  # a folder without one is the usual case
        pass
    named = getattr(with_ends, "eos_token_id", None)
    ends = [named] if isinstance(named, int) else list(named or [])
    own = tokenizer.eos_token_id
    return frozenset([*ends, own] if own is not None else ends)
