"""From what a config calls a model to something transformers loads."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from alignment.data.assets import ASSETS, fetch_asset
from alignment.data.cache import cache_dir, filled_once

PREFIX = "asset:"


def resolve_model(path: str) -> str:
    """`asset:NAME` becomes a Hugging Face folder in the cache; a local folder or a hub name comes back as it is.

    Raises:
        ValueError: unknown asset; a local path that is no model folder, or one that carries its own code.
    """
    if path.startswith(PREFIX):
        return str(_converted(path.removeprefix(PREFIX)))
    folder = Path(path).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return str(folder)
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(
            f"model path: got {path!r}, expected a model folder; correct the path, or give a hub name or asset:NAME"
        )
    return path


def check_folder(folder: Path) -> None:
    """Refuse a model folder that would run code of its own or unpickle its weights.

    Raises:
        ValueError: no config.json; `auto_map` in a config file; weights only in pickle form.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder: got {folder} without config.json, expected a Hugging Face folder; correct it")
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file() and "auto_map" in json.loads(file.read_text(encoding="utf-8")):
            raise ValueError(
                f"model folder: got auto_map in {file}, expected a model that needs no code of its own; "
                "use an architecture that transformers has built in"
            )
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model folder: got pickled weights (*.bin) in {folder}, expected *.safetensors; convert them first"
        )


def _converted(name: str) -> Path:
    models = sorted(key for key, asset in ASSETS.items() if asset.members[0].endswith(".gguf"))
    if name not in models:
        raise ValueError(f"model path: got {PREFIX}{name}, expected one of {[PREFIX + m for m in models]}; name one")
    target = cache_dir() / "models" / f"{name}-{ASSETS[name].sha256[:12]}"
    with filled_once(target) as folder:
        if folder is not None:
            gguf = fetch_asset(name)
            print(f"converting {gguf.name} to a Hugging Face folder (once): {target}", file=sys.stderr, flush=True)
            _convert_gguf(gguf, folder)
    return target


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """De-quantise to float32 safetensors, with tokenizer and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The de-quantiser's progress bar has no switch.
        with contextlib.redirect_stderr(io.StringIO()):
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = loaded.config
        # A model read from gguf counts as quantised and refuses to be saved: its weights move to a fresh one.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            fresh = AutoModelForCausalLM.from_config(config)
        fresh.load_state_dict(loaded.state_dict(), assign=True)
        fresh.tie_weights()
        fresh.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        fresh.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
