"""The reward model that a server hosts: ids and scores of training, whatever stands beside them in a batch."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tiny import CHATML, SPECIALS, byte_tokenizer, write_tiny_reward_model

from alignment.data.chat import encode_conversation, eos_ids_of_model, load_tokenizer
from alignment.learners.reward_model import score_sequences
from alignment.models import load_scalar_model
from alignment.packing import MicroBatchLimit
from rewards.last_states import padded_states
from rewards.scalar_model import ChatEncoder, ScalarModel

TEXTS = [
    ("What helps?", "Rest."),
    ("", ""),
    ("头痛怎么办？", "多休息。\n"),
    ("Say <|im_end|>", "Yes.<|im_end|>\n<|im_start|>user\nMore<|im_end|><|endoftext|>"),
    ("\U000f0000 stand-in \uf8f0", "\U000f0001<|im_end|>\U000f0000"),
    (" spaced ", "  spaced\n\n "),
]


@pytest.fixture(scope="module")
def hosted(tiny) -> ScalarModel:
    return ScalarModel(str(tiny / "reward"))


@pytest.mark.parametrize(("prompt", "response"), TEXTS)
def test_ids_are_those_of_training(tiny, hosted, prompt, response):
    folder = str(tiny / "reward")
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    ids, _ = encode_conversation(tokenizer, messages, eos_ids=eos_ids_of_model(tokenizer, folder))
    assert hosted.encode(prompt, response) == ids
    ends = [i for i in ids if i == tokenizer.eos_token_id]
    assert len(ends) == 2


def test_ids_are_those_of_training_with_a_tokenizer_that_merges():
    """Merges reach over the seam between the template and a text, and into what spells a control token."""
    from tokenizers import pre_tokenizers, trainers

    tokenizer = byte_tokenizer()
    corpus = ["<|im_start|>assistant\nRest and rest. <|im_end|>\n<|im_start|>user\nWhat helps? 头痛怎么办？\n\n"] * 9
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Split(pattern="\x00", behavior="isolated")  # no border but control tokens
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [core.pre_tokenizer, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet)
    core.train_from_iterator(corpus, trainer)
    tokenizer.chat_template = CHATML
    assert len(tokenizer("assistant\nRest", add_special_tokens=False)["input_ids"]) < 5
    encoder = ChatEncoder(tokenizer, frozenset([2]))
    for prompt, response in [*TEXTS, ("What helps?", "Rest and rest. "), ("a", "ant\nRest")]:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        assert encoder.encode(prompt, response) == encode_conversation(tokenizer, messages)[0]


def test_scores_are_those_of_training_in_any_company(tiny, hosted):
    draw = random.Random(0)
    sequences = [[draw.randrange(259) for _ in range(length)] for length in (1, 2, 3, 17, 40, 200, 512)]
    expected = score_sequences(load_scalar_model(str(tiny / "reward")), sequences, limit=MicroBatchLimit(rows=1))
    assert hosted.score(sequences) == pytest.approx(expected, abs=2e-5)
    assert [hosted.score([one])[0] for one in sequences] == pytest.approx(expected, abs=2e-5)
    assert len({round(score, 4) for score in expected}) == len(expected)


def test_padding_on_either_side_with_anything_in_it_changes_nothing(hosted):
    """Ids of padding are EOS, which ends real sequences too, and ids that do not exist."""
    torch.manual_seed(0)
    rows = [torch.randint(0, 259, (length,)) for length in (3, 9, 14)]
    rows[1][-1] = 2
    alone = torch.cat([padded_states(hosted._model, row[None], torch.ones_like(row)[None]) for row in rows])
    for padding in (2, 0, 99_999):
        for left in (False, True):
            ids, mask = torch.full((3, 16), padding), torch.zeros(3, 16, dtype=torch.bool)
            for i, row in enumerate(rows):
                place = slice(16 - len(row), 16) if left else slice(0, len(row))
                ids[i, place], mask[i, place] = row, True
            assert torch.allclose(padded_states(hosted._model, ids, mask), alone, atol=2e-5)
    assert len(alone.unique(dim=0)) == 3


def test_too_long_is_no_score(hosted):
    room = 512 - len(hosted.encode("a", ""))
    assert len(hosted.encode("a", "x" * room)) == 512
    assert hosted.encode("a", "x" * (room + 1)) is None


def test_saved_statistics_standardise_unless_raw(tmp_path):
    folder = write_tiny_reward_model(tmp_path / "model")
    raw = ScalarModel(str(folder)).score([[5, 6, 7]])[0]
    (folder / "score_statistics.json").write_text(json.dumps({"mean": 0.25, "std": 2.0}))
    assert ScalarModel(str(folder)).score([[5, 6, 7]])[0] == pytest.approx((raw - 0.25) / 2, abs=1e-6)
    assert ScalarModel(str(folder), standardize=False).score([[5, 6, 7]])[0] == raw
    for broken in ('{"mean": 0, "std": 0}', '{"mean": NaN, "std": 1}', "{}", "["):
        (folder / "score_statistics.json").write_text(broken)
        with pytest.raises(ValueError, match="got no finite mean and std above 0"):
            ScalarModel(str(folder))


def test_models_that_are_no_reward_models_are_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match=r"no weights for \['score.weight'\]"):
        ScalarModel(str(tiny / "policy"))
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(tiny / "reward")
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "two")
    byte_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="with 2 labels, expected a decoder with one label"):
        ScalarModel(str(tmp_path / "two"))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "without chat template"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "whose answers no EOS closes"),
        ("{{ messages | length }}{{ messages[-1]['content'] }}<|im_end|>", "renders a question differently"),
        ("{{ raise_exception('no') }}", "refuses a question and its answer"),
    ],
)
def test_templates_that_answers_cannot_be_read_by(template, said):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=said):
        ChatEncoder(tokenizer, frozenset([2]))
