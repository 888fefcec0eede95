"""One PPO step on two cores, next to a rival's on the same work in the same run: `python benchmarks/ppo_step.py`.

The work: four full fp32 models of SmolLM2-135M (policy, reference, critic, reward), 16 prompts of about 38 tokens, 64
new tokens each, one epoch, one minibatch, AdamW. Ours goes through Ray actors, all processes counted in the memory,
in two layouts: all roles in one Ray process, and the trained models apart. Prints seconds by phase, the share of this
machine's matrix-product rate, peak memory, and both ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alignment.config import PromptDataConfig
from alignment.data.chat import load_tokenizer
from alignment.data.model_assets import resolve_model
from alignment.data.prompts import load_prompts
from alignment.memory import MemoryMeter
from benchmarks.meter import matmul_peak

ROOT = Path(__file__).resolve().parents[1]
NUM_PROMPTS, NEW_TOKENS, PROMPT_TOKENS = 16, 64, 38
PHASES = ("generate", "score", "update", "sync")

WARM_UP_STEPS = 2
LAYOUTS = {
    "one process": "colocate: [[policy, rollout, critic, reference, reward_model]]",
    # The sampler uses the policy's own weights; the two frozen models share a process.
    "three processes": "colocate: [[policy, rollout], [reference, reward_model]]",
}

RUN = """
run: {{num_steps: {steps}, checkpoint_every: 1000, trackers: []}}
data: {{source: {{path: {prompts}}}, held_out: 0, max_prompt_tokens: 64}}
model: {{path: {model}}}
policy: {{micro_batch_size: 8, optimizer: {{lr: 1.0e-6}}}}
critic: {{micro_batch_size: 8, optimizer: {{lr: 1.0e-6}}}}
rollout: {{max_new_tokens: 64, ignore_eos: true}}
reward: {{model: {reward}}}
ppo: {{rollout_batch_size: 16, minibatch_size: 16, ppo_epochs: 1, one_pass: true}}
"""


def write_prompts(path: Path, tokenizer: Any) -> None:
    """Real questions whose rendered prompts are closest to 38 tokens; both systems get the same ids."""
    prompts = load_prompts(PromptDataConfig(held_out=0), tokenizer).train
    chosen = sorted(prompts, key=lambda p: (abs(len(p.prompt_ids) - PROMPT_TOKENS), p.id))[:NUM_PROMPTS]
    rows = [{"question": p.messages[-1]["content"], "prompt_ids": list(p.prompt_ids)} for p in chosen]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_reward_model(folder: Path, model: str, tokenizer: Any) -> None:
    from alignment.models import load_scalar_model, quiet_transformers, save_model

    quiet_transformers()
    save_model(load_scalar_model(model, head="random"), folder, tokenizer)


def run_ours(folder: Path, model: str, steps: int, layout: str) -> dict[str, Any]:
    """`steps` measured steps, after those that warm up."""
    (folder / "cluster.yaml").write_text(LAYOUTS[layout])
    config = RUN.format(
        steps=steps + WARM_UP_STEPS, prompts=folder / "prompts.jsonl", model=model, reward=folder / "reward"
    )
    (folder / "run.yaml").write_text(config)
    command = [sys.executable, str(ROOT / "recipes" / "ppo_medical.py")]
    command += ["--config", str(folder / "run.yaml"), "--cluster", str(folder / "cluster.yaml")]
    output = folder / layout.replace(" ", "_")
    command += ["--output-dir", str(output)]
    with MemoryMeter() as meter:
        subprocess.run(command, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][WARM_UP_STEPS:]
    return {
        "layout": layout,
        "seconds": [row["timing/step"] for row in rows],
        "phases": {phase: statistics.median(row[f"timing/{phase}"] for row in rows) for phase in PHASES},
        "peak_mb": meter.peak_mb,
        "processes": meter.peak_processes,
    }


def run_rival(folder: Path, model: str, steps: int, trl_path: Path | None) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "rivals" / "trl_ppo.py"), "--model", model]
    command += [
        "--prompts-file",
        str(folder / "prompts.jsonl"),
        "--steps",
        str(steps),
        "--warm-up-steps",
        str(WARM_UP_STEPS),
        "--json",
        str(folder / "trl.json"),
    ]
    command += ["--trl-path", str(trl_path)] if trl_path else []
    subprocess.run(command, check=True, stdout=sys.stderr)
    result: dict[str, Any] = json.loads((folder / "trl.json").read_text())
    return result


def operations(backbone: float, head: float, prompt_tokens: float) -> dict[str, float]:
    """TFLOP of the phases: 2 per weight and token forward, 4 more backward; the head on response tokens only.

    score: the reference with its head and the reward model. update: policy and critic, whose own forwards give the
    old log-probabilities and the values.
    """
    tokens, answers = NUM_PROMPTS * (prompt_tokens + NEW_TOKENS), NUM_PROMPTS * NEW_TOKENS
    body, top = 2 * backbone * tokens / 1e12, 2 * head * answers / 1e12
    return {"generate": body + top, "score": 2 * body + top, "update": 6 * body + 3 * top}


def report(ours: list[dict[str, Any]], rival: dict[str, Any] | None, model: str, prompt_tokens: float) -> str:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    head = config.vocab_size * config.hidden_size
    work = operations(sum(_sizes(model)) - head, head, prompt_tokens)
    peak = matmul_peak()
    lines = [
        f"matrix products here: {peak.square:.0f} GFLOP/s at 2048^3, {peak.model:.0f} at the model's shapes, "
        f"{peak.threads} threads"
    ]
    for figures in ours:
        lines += layout_lines(figures, work, peak.model)
    if rival is not None:
        theirs = statistics.median(rival["seconds_per_step"])
        lines.append(f"{rival['system']}: {theirs:.2f} s a step, peak memory {rival['peak_mb']:.0f} MB")
        for figures in ours:
            speed, memory = theirs / statistics.median(figures["seconds"]), figures["peak_mb"] / rival["peak_mb"]
            lines.append(f"{figures['layout']}: ratio of speed {speed:.2f}x, of memory {memory:.2f}")
    return "\n".join(lines)


def layout_lines(figures: dict[str, Any], work: dict[str, float], peak: float) -> list[str]:
    """The table of one layout: seconds by phase, and how much of the rate of matrix products each reaches."""
    step = statistics.median(figures["seconds"])
    lines = [f"{figures['layout']:<16} {'seconds':>8} {'TFLOP':>7} {'GFLOP/s':>8} {'of peak':>8}"]
    for phase, seconds in figures["phases"].items():
        flops = work.get(phase)
        rate = 0.0 if flops is None else 1e3 * flops / seconds
        shown = "" if flops is None else f"{flops:>7.2f} {rate:>8.0f} {rate / peak:>7.0%}"
        lines.append(f"  {phase:<14} {seconds:>8.2f} {shown}")
    lines.append(f"  {'other':<14} {step - sum(figures['phases'].values()):>8.2f}")
    lines.append(f"  {'step':<14} {step:>8.2f} {sum(work.values()):>7.2f}")
    lines.append(f"  peak memory {figures['peak_mb']:.0f} MB in {figures['processes']} processes (shared pages once)")
    return lines


def _sizes(model: str) -> list[int]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return [p.numel() for p in AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="measured steps, after two that warm up")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="this one alone; default: all")
    parser.add_argument("--no-rival", action="store_true", help="ours alone")
    parser.add_argument("--trl-path", type=Path, help="folder with trl 1.9.2; default: installed once into the cache")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    model = resolve_model("asset:smollm2-135m-instruct")
    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder / "prompts.jsonl", tokenizer)
        rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
        prompt_tokens = statistics.fmean(len(row["prompt_ids"]) for row in rows)
        write_reward_model(folder / "reward", model, tokenizer)
        rival = None if args.no_rival else run_rival(folder, model, args.steps, args.trl_path)
        ours = [run_ours(folder, model, args.steps, layout) for layout in args.layout or LAYOUTS]
    print(report(ours, rival, model, prompt_tokens))
    if args.json:
        args.json.write_text(json.dumps({"ours": ours, "rival": rival}, indent=2) + "\n")


if __name__ == "__main__":
    main()
