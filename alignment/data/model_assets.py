"""From what a config calls a model to something transformers loads."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.data.assets import ASSETS, fetch_asset
from alignment.data.cache import cache_dir, filled_once
from alignment.data.hub import remedy, why_offline

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "asset:"


def resolve_model(path: str, revision: str | None = None) -> str:
    """`asset:NAME` becomes a Hugging Face folder in the cache; a local folder or a hub name comes back as it is.

    Raises:
        ValueError: unknown asset; a local path that is no model folder, or one that carries its own code; a hub name
            that neither the hub nor its cache on this machine has at `revision`.
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
    config = model_file(path, "config.json", revision)
    if why_offline() is not None:
        check_folder(config.parent)
    return path


def model_file(path: str, name: str, revision: str | None = None) -> Path:
    """One file of a model folder or of a hub model, from the hub or its cache.

    Raises:
        ValueError: a hub name that neither has.
    """
    from huggingface_hub import hf_hub_download

    if Path(path).is_dir():
        return Path(path, name)
    trouble = why_offline()
    try:
        return Path(hf_hub_download(path, name, revision=revision))
    except (OSError, ValueError) as error:
        reason = f"not in its cache, and {trouble}" if trouble else str(error).strip().splitlines()[0]
        at = f" at revision {revision}" if revision else ""
        raise ValueError(
            f"model {path!r}{at}: got no folder of that name here and no {name} from the hub ({reason}), expected a "
            f"model that one of them has; {remedy('a folder or asset:NAME')}"
        ) from error


def check_folder(folder: Path) -> None:
    """Refuse a model folder that is not whole, or would run code of its own or unpickle its weights.

    Raises:
        ValueError: no config.json; JSON that is broken; `auto_map` in a config file; weights that are missing, cut
            short, or only there in pickle form.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder: got {folder} without config.json, expected a Hugging Face folder; correct it")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        file = folder / name
        if file.is_file() and "auto_map" in _read_object(file):
            raise ValueError(
                f"model folder: got auto_map in {file}, expected a model that needs no code of its own; "
                "use an architecture that transformers has built in"
            )
    index = folder / "model.safetensors.index.json"
    needed = set(_read_object(index).get("weight_map", {}).values()) if index.is_file() else {"model.safetensors"}
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if missing and any(folder.glob("*.bin")):
        raise ValueError(
            f"model folder: got pickled weights (*.bin) in {folder}, expected *.safetensors; convert them first"
        )
    if missing:
        raise ValueError(
            f"model folder: got {folder} without {', '.join(missing[:3])}, expected the weights of the model there; "
            "copy them too, or correct the path"
        )
    weight_shapes(folder)


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers loads from a folder, from the files' headers: reads no weight.

    {} for a folder whose weights are still on the hub.

    Raises:
        ValueError: a file that is cut short, or no safetensors file at all.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="np") as tensors:
                names = tensors.keys()
                shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in names})
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"model folder: got {file}, which is no whole safetensors file ({error}), expected the model's "
                "weights; copy or download it again (git lfs pull, where it is only a pointer to the file)"
            ) from error
    return shapes


def read_weight(folder: Path, name: str) -> Tensor:
    """One tensor of a folder, as it is stored there.

    Raises:
        ValueError: no file has it.
    """
    from safetensors import safe_open

    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            if name in set(tensors.keys()):
                weight: Tensor = tensors.get_tensor(name)
                return weight
    raise ValueError(
        f"model folder: got {folder}, whose files have no {name}, expected every weight by the model's own name; save "
        "the model again with transformers"
    )


def _weight_files(folder: Path) -> list[Path]:
    """Empty where some are still on the hub."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [whole] if whole.is_file() else []
    if not files and index.is_file():
        files = sorted({folder / name for name in _read_object(index).get("weight_map", {}).values()})
    return files if all(file.is_file() for file in files) else []


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """transformers without progress bars and load reports for the time of the block."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file}: got JSON that is broken ({error}), expected that of a Hugging Face model; copy or save the "
            "folder again"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{file}: got a JSON {type(data).__name__}, expected an object; copy or save the folder again"
        )
    return data


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

    with quiet_loading():
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
