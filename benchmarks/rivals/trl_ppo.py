"""TRL's PPO on the work of the PPO benchmark: seconds per step and peak memory, as JSON.

    python benchmarks/rivals/trl_ppo.py --model MODEL_FOLDER --json trl.json

The work: four full fp32 models (policy, reference, value, reward), 16 prompts of 38 tokens, 64 new tokens each, one
epoch, one minibatch, AdamW. TRL is set up to run as fast as it can here: no gradient checkpointing, no trackers, no
evaluation, no samples, no saving. Generation has no end token, so every answer has all its tokens and nobody gains by
stopping early; the padding token is a new one that the model cannot emit, because TRL takes it for an answer's end.
Steps that warm up are not reported.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.rivals.trl_install import trl_folder
from benchmarks.rivals.trl_steps import clock_class

TRL_VERSION = "1.9.2"
PAD_TOKEN = "<|benchmark_pad|>"
FILLER = "A patient asks what to do about a headache that has lasted for three days. "


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of the causal language model")
    parser.add_argument("--trl-path", type=Path, help=f"folder that holds trl {TRL_VERSION}; default: install it once")
    parser.add_argument("--prompts", type=int, default=16, help="prompts per step")
    parser.add_argument("--prompt-tokens", type=int, default=38, help="tokens a prompt is repeated or cut to")
    parser.add_argument("--prompts-file", type=Path, help="JSONL with prompt_ids, prompt or question on each line")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of every answer")
    parser.add_argument("--steps", type=int, default=2, help="steps to report, after those that warm up")
    parser.add_argument("--warm-up-steps", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, default=16, help="sequences per training forward")
    parser.add_argument("--rollout-batch-size", type=int, default=16, help="sequences per rollout forward")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the result goes; default: standard output")
    return parser.parse_args()


def load_prompts(file: Path | None, tokenizer: Any, count: int, num_tokens: int) -> list[list[int]]:
    """`count` prompts as token ids.

    A line's `prompt_ids` are taken as they are; a text (`prompt` or `question`) is cut to `num_tokens`. Without a
    file, a filler text is repeated and cut, each prompt starting at another word.

    Raises:
        ValueError: the file has fewer than `count` lines, or a line has none of the three fields.
    """
    if file is None:
        words = FILLER.split()
        texts = [" ".join((words[i % len(words) :] + words * num_tokens)[:num_tokens]) for i in range(count)]
        return [tokenizer(text)["input_ids"][:num_tokens] for text in texts]
    lines = file.read_text(encoding="utf-8").splitlines()
    if len(lines) < count:
        raise ValueError(
            f"got {len(lines)} lines in {file}, expected at least {count}; add prompts or lower --prompts"
        )
    prompts = []
    for number, line in enumerate(lines[:count], start=1):
        row = json.loads(line)
        text = row.get("prompt", row.get("question"))
        if "prompt_ids" not in row and text is None:
            raise ValueError(f"got fields {sorted(row)} in {file}:{number}, expected prompt_ids, prompt or question")
        prompts.append(row["prompt_ids"] if "prompt_ids" in row else tokenizer(text)["input_ids"][:num_tokens])
    return prompts


def load_models(path: str, pad_token_id: int, seed: int) -> dict[str, Any]:
    """The four models in fp32; value and reward model are the same backbone with a scalar head drawn from `seed`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    def scalar_model(head_seed: int) -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
        generator = torch.Generator().manual_seed(head_seed)
        with torch.no_grad():
            model.score.weight.normal_(std=0.02, generator=generator)
        model.config.pad_token_id = pad_token_id
        return model

    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    for model in (policy, reference):
        model.generation_config.pad_token_id = model.config.pad_token_id = pad_token_id
    return {
        "model": policy,
        "ref_model": reference,
        "value_model": scalar_model(seed),
        "reward_model": scalar_model(seed + 1),
    }


def build_trainer(args: argparse.Namespace, output_dir: str, clock: Any) -> Any:
    """TRL's trainer over the benchmark's prompts, with `clock` told of every finished step."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    # TRL masks padding before every forward, so its id may lie beyond the embedding. The end token is the same one,
    # so that TRL's count of end tokens is a count of answers cut short.
    tokenizer = AutoTokenizer.from_pretrained(
        args.model, padding_side="left", pad_token=PAD_TOKEN, eos_token=PAD_TOKEN
    )
    prompts = load_prompts(args.prompts_file, tokenizer, args.prompts, args.prompt_tokens)
    config = PPOConfig(
        output_dir=output_dir,
        total_episodes=args.prompts * (args.steps + args.warm_up_steps),
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.prompts // args.micro_batch_size,
        local_rollout_forward_batch_size=args.rollout_batch_size,
        num_mini_batches=1,
        num_ppo_epochs=1,
        response_length=args.new_tokens,
        stop_token=None,
        temperature=1.0,
        learning_rate=args.learning_rate,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=args.seed,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[clock],
        **load_models(args.model, tokenizer.pad_token_id, args.seed),
    )


def build_clock() -> Any:
    """A callback that keeps seconds per step and checks that no answer was cut short."""

    class Clock(clock_class()):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert kwargs["logs"]["val/num_eos_tokens"] == 0, (
                "an answer held the padding token, so TRL worked on fewer tokens"
            )

    return Clock()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the steps and return the report."""
    import torch

    from alignment.memory import MemoryMeter

    torch.set_num_threads(args.threads)
    clock = build_clock()
    load_before = os.getloadavg()[0]
    with MemoryMeter(count_dev_shm=False) as meter, tempfile.TemporaryDirectory() as folder:
        build_trainer(args, folder, clock).train()
    packages = ("torch", "transformers", "accelerate")
    return {
        "system": f"trl {TRL_VERSION}",
        "seconds_per_step": [round(seconds, 3) for seconds in clock.seconds[args.warm_up_steps :]],
        "warm_up_seconds": [round(seconds, 3) for seconds in clock.seconds[: args.warm_up_steps]],
        "peak_mb": round(meter.peak_mb),
        "prompts": args.prompts,
        "new_tokens": args.new_tokens,
        "micro_batch_size": args.micro_batch_size,
        "rollout_batch_size": args.rollout_batch_size,
        "threads": args.threads,
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "versions": {"trl": TRL_VERSION} | {name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    args = parse_args()
    if args.prompts % args.micro_batch_size:
        raise ValueError(
            f"got --prompts {args.prompts} and --micro-batch-size {args.micro_batch_size}, expected a multiple of it; "
            "change one of them"
        )
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    sys.path.insert(1, str(trl_folder(TRL_VERSION, args.trl_path)))
    report = json.dumps(measure(args), indent=2)
    if args.json is None:
        print(report)
    else:
        args.json.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
