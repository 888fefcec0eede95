"""Train a Bradley-Terry reward model on real medical answers: `python recipes/reward_model_medical.py`.

The preferred answer of a pair is a clinician's treatment plan for the diagnosis asked about. The result,
`OUTPUT_DIR/final`, is an ordinary sequence-classification folder; `recipes/ppo_medical.py` hosts it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from actors.build import reward_training_actors, reward_training_role
from actors.reward_training import write_statistics
from alignment.config import RewardModelRunConfig
from alignment.data.chat import eos_ids_of_model, load_tokenizer
from alignment.data.model_assets import resolve_model
from alignment.data.preferences import load_preference_pairs
from alignment.fingerprint import model_fingerprint, records_fingerprint
from alignment.loops.offline import pair_report, train_reward_model
from alignment.metrics import check_trackers
from alignment.model_checks import check_model
from alignment.types import PreferencePair
from recipes import checks, common, planning

Scores = list[tuple[float, float]]
NUM_STANDARD = 64
"""Training pairs whose scores set the scale when no pair is held out."""


def train(job: common.Job[RewardModelRunConfig]) -> None:
    config = job.config
    checks.check_machines(job.cluster, ("reward_model",), local=job.local)
    checks.check_attention(config.model, job.cluster, ("reward_model",))
    if not job.local:
        checks.check_splitting(config.model, job.cluster, {"reward_model": config.training.adapter})
    check_trackers(config.run.trackers)
    model_path = resolve_model(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(model_path, config.model.revision)
    model = config.model.at(model_path, config.model.revision)
    num_parameters = check_model(
        "training",
        model,
        tokenizer,
        config.training.adapter,
        head="random",
        lengths={"data.max_tokens": config.data.max_tokens},
    )
    pairs = load_preference_pairs(
        config.data, tokenizer, eos_ids=eos_ids_of_model(tokenizer, model_path, config.model.revision)
    )
    if job.dry_run:
        checks.check_start(job)
        print(planning.reward_model_plan(job, num_parameters, pairs.summary()))
        return
    print(f"pairs: {pairs.summary()}", flush=True)
    directory, resume_from = common.open_run_directory(job)
    directory.keep_inputs(
        {"model": model_fingerprint(model_path), "pairs": records_fingerprint([*pairs.train, *pairs.held_out])}
    )

    actors = reward_training_actors(config, job.cluster, model_path=model_path)
    with job.groups(actors) as groups:
        role = reward_training_role(groups)
        run = common.make_run(directory, config.run, model_path=model_path)
        first_step = common.restore(job, run, resume_from, {"reward_model": role})["step"] if resume_from else 0

        def score(some: Sequence[PreferencePair]) -> Scores:
            return role.score_pairs(some).result() if some else []

        before = score(pairs.held_out)
        train_reward_model(config, pairs.train, reward_model=role, run=run, first_step=first_step)
        after = score(pairs.held_out)
        role.export(directory.final).result()
        # Standardised on real answers of both kinds, so that a score of 1 means one deviation better than these.
        known = after or score(pairs.train[:NUM_STANDARD])
        write_statistics(directory.final, [score for pair in known for score in pair])
        common.write_summary(job, directory, accuracy(before, after, config.run.seed))
        run.close()


def accuracy(before: Scores, after: Scores, seed: int) -> dict[str, Any]:
    """The held-out table; empty when no pair was held out."""
    return {"accuracy": common.compare_items(pair_report(before), pair_report(after), seed)} if after else {}


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("reward_model_medical", RewardModelRunConfig, train, argv)


if __name__ == "__main__":
    sys.exit(main())
