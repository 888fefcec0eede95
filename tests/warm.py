"""Run recipes as scripts in processes that have their imports behind them: a refusal then takes half a second.

Each run is a fork of one server process, which has imported and computed nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = (
    *(
        "ray",
        "torch",
        "transformers",
        "peft",
        "datasets",
        "safetensors.torch",
        "transformers.models.auto.modeling_auto",
    ),
    *("transformers.models.llama.modeling_llama", "alignment.model_checks", "actors.build", "actors.launch"),
    *("recipes.ppo_medical", "recipes.reward_model_medical"),
)


def _script(command: list[str], env: dict[str, str], output: str) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    os.environ.update(env)
    script = command[1]
    sys.argv = command[1:]
    # As for a script that is started: its folder comes first.
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def run_script(command: list[str], *, timeout: float, env: dict[str, str] | None = None) -> CompletedProcess[str]:
    """`command`, which is [python, script, *flags], in the project's folder. `env`: nothing that imports read."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTS))
    with tempfile.TemporaryDirectory() as output:
        process = context.Process(target=_script, args=(command, {**os.environ, **(env or {})}, output))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired(command, timeout)
        texts = [Path(output, name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        return CompletedProcess(command, process.exitcode, *texts)
