"""Losses and gradients beside TRL 1.16 on the same batch of the same model. Skipped where TRL is not installed.

TRL's own trainers make the batch, run the model and compute the loss; ours reads the batch's ids alone.
"""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from tiny import write_tiny_model

trl = pytest.importorskip("trl")
if not importlib.metadata.version("trl").startswith("1.16."):
    pytest.skip("the comparison is with TRL 1.16", allow_module_level=True)

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from alignment.label_losses import mismatched_kl  # noqa: E402
from alignment.logprobs import sequence_logps, token_logprobs  # noqa: E402
from alignment.losses import kto_loss  # noqa: E402
from alignment.preference_losses import length_desensitised_logps  # noqa: E402
from alignment.preference_objectives import PairLogps, PreferenceObjective, Term  # noqa: E402

PAIRS = [
    ("Why?", "Because of the wind.", "No."),
    ("And then", " it rained", " it was a very long afternoon"),
    ("Name a colour:", " red", " seven"),
    ("Who?", "Nobody knows", "Me, and all of my friends"),
]
COMMON = {"per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "max_length": 64, "bf16": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, another model as its reference, and their tokenizer."""
    folder = tmp_path_factory.mktemp("rival")
    paths = [str(write_tiny_model(folder / str(seed), seed=seed)) for seed in (0, 1)]
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths)
    return policy, reference, AutoTokenizer.from_pretrained(paths[0])


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def logprobs_of(model, batch, prefix=""):
    """(B, T) log-probabilities of tokens, and the mask of answers."""
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits
    return token_logprobs(logits, ids), batch[f"{prefix}completion_mask"].bool()


def gradients_after(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, theirs, ours):
    """Both losses within 1e-5, and every gradient."""
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5, rel=1e-5)
    expected, found = gradients_after(model, theirs), gradients_after(model, ours)
    assert expected.keys() == found.keys()
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def sums_of(model, batch, alpha):
    logprobs, mask = logprobs_of(model, batch)
    lengths = mask.sum(1)
    chosen, rejected = lengths.chunk(2)
    common = torch.minimum(chosen, rejected).repeat(2)
    weighted = length_desensitised_logps(logprobs, mask, common, alpha=alpha).chunk(2)
    return weighted, sequence_logps(logprobs, mask).chunk(2), lengths.chunk(2)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"loss_type": ["sigmoid"]}, {}),
        ({"loss_type": ["sigmoid"], "ld_alpha": 0.4}, {"length_alpha": 0.4}),
        ({"loss_type": ["robust"], "label_smoothing": 0.1}, {"terms": ["robust"], "label_smoothing": 0.1}),
        ({"loss_type": ["hinge"]}, {"terms": ["hinge"]}),
        ({"loss_type": ["ipo"]}, {"terms": [("ipo", 1.0, True)]}),
        ({"loss_type": ["sigmoid_norm"]}, {"terms": [("sigmoid", 1.0, True)]}),
        (
            {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [0.8, 0.01, 1.5]},
            {"terms": [("sigmoid", 0.8, False), ("ipo", 0.01, True), ("sft", 1.5, False)]},
        ),
    ],
    ids=lambda settings: ",".join(settings.get("loss_type", "")),
)
def test_dpo_family(models, tmp_path, theirs, ours):
    policy, reference, tokenizer = models
    rows = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in PAIRS])
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(output_dir=str(tmp_path), beta=0.3, gradient_checkpointing=False, **COMMON, **theirs),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    batch = batch_of(trainer)
    assert len(batch["input_ids"]) == 8
    ours = dict(ours)
    terms = [(kind, 1.0, False) if isinstance(kind, str) else kind for kind in ours.pop("terms", ["sigmoid"])]
    objective = PreferenceObjective(
        terms=[Term(kind=kind, weight=weight, per_token=per_token) for kind, weight, per_token in terms],
        beta=0.3,
        **ours,
    )
    alpha = objective.length_alpha
    (chosen, rejected), (plain, _), lengths = sums_of(policy, batch, alpha)
    with torch.no_grad():
        ref, _, _ = sums_of(reference, batch, alpha)
    pairs = PairLogps(chosen, rejected, *lengths, *ref, chosen_sft=plain)
    loss, _ = objective.loss(pairs, denominator=4, num_tokens=float(lengths[0].sum()))
    assert_same(policy, trainer.compute_loss(policy, batch), loss)


@pytest.mark.parametrize("labels", [[True, False, True, False], [True] * 4, [False] * 4])
def test_kto(models, tmp_path, labels):
    policy, reference, tokenizer = models
    rows = [{"prompt": p, "completion": c, "label": label} for (p, c, _), label in zip(PAIRS, labels, strict=True)]
    weights = {"desirable_weight": 1.1, "undesirable_weight": 1.3}
    trainer = trl.KTOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.KTOConfig(output_dir=str(tmp_path), beta=0.3, gradient_checkpointing=False, **COMMON, **weights),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = batch_of(trainer)
    own = [sequence_logps(*logprobs_of(model, batch)) for model in (policy, reference)]
    other = [sequence_logps(*logprobs_of(model, batch, "KL_")) for model in (policy, reference)]
    desirable = torch.as_tensor(batch["label"]).bool()
    loss, _ = kto_loss(*own, desirable, mismatched_kl(*other), beta=0.3, **weights)
    assert_same(policy, trainer.compute_loss(policy, batch), loss)


@pytest.mark.parametrize(
    ("theirs", "terms"),
    [
        ({"loss_type": "sigmoid", "cpo_alpha": 0.0}, [Term(kind="cpo")]),
        ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}, [Term(kind="simpo")]),
        ({"loss_type": "sigmoid", "cpo_alpha": 0.7}, [Term(kind="cpo"), Term(kind="sft", weight=0.7)]),
        ("orpo", [Term(kind="orpo")]),
    ],
    ids=["cpo", "simpo", "cpo with sft", "orpo"],
)
def test_without_a_reference(models, tmp_path, theirs, terms):
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy, _, tokenizer = models
    rows = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in PAIRS])
    kind, config = (ORPOTrainer, ORPOConfig) if theirs == "orpo" else (CPOTrainer, CPOConfig)
    args = config(
        output_dir=str(tmp_path),
        beta=0.3,
        gradient_checkpointing=False,
        **COMMON,
        **({} if theirs == "orpo" else theirs),
    )
    trainer = kind(model=policy, args=args, train_dataset=rows, processing_class=tokenizer)
    batch = batch_of(trainer)
    joined = trainer.concatenated_inputs(batch, padding_value=tokenizer.pad_token_id)
    read = {
        "input_ids": joined["concatenated_input_ids"],
        "attention_mask": joined["concatenated_attention_mask"],
        "completion_mask": joined["concatenated_labels"] != -100,
    }
    (chosen, rejected), _, lengths = sums_of(policy, read, 1.0)
    objective = PreferenceObjective(terms=terms, beta=0.3, margin=0.5)
    loss, _ = objective.loss(PairLogps(chosen, rejected, *lengths), denominator=4, num_tokens=float(lengths[0].sum()))
    theirs_loss, _ = trainer.get_batch_loss_metrics(policy, batch, "train")
    if theirs == "orpo":
        # TRL's likelihood term reads the prompt as well: it is taken off again.
        whole = read["input_ids"][:4].masked_fill(~read["attention_mask"][:4].bool(), -100)
        logits = policy(input_ids=read["input_ids"][:4], attention_mask=read["attention_mask"][:4]).logits
        theirs_loss = theirs_loss - torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), whole[:, 1:].flatten()
        )
    assert_same(policy, theirs_loss, loss)
