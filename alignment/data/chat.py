"""The one place where tokens and masks are born.

Text becomes tokens by the model's own chat template. Three rules hold everywhere:

- What a message says is text. A control token spelt out in it ("<|im_end|>") is encoded character by character, so
  nobody can close a turn from inside one: its spelling goes through the template as a private-use character, and
  is put back as plain text when the rendered string is cut at those characters and encoded piece by piece. A
  message without such spelling takes the ordinary path, so its ids are those of `apply_chat_template`.
- The prompt of a conversation has the ids that generation starts from, and the answer is tokenised after it. Masks
  come from that boundary, never from comparing ids, so padding may share its id with EOS.
- A trained answer ends with the end-of-turn token, and nothing that the template puts behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
ROLES = ("system", "user", "assistant", "tool")
_BEGIN, _DIGIT, _END = "\uf8f0", "\uf8f1", "\uf8f2"  # private use; the digit is repeated to count


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer that can train and answer: with chat template, EOS and padding; no code of its own is run.

    A missing padding token becomes EOS: harmless, since masks come from lengths.

    Raises:
        ValueError: no tokenizer there, no chat template, no EOS.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer {path!r}: got none that could be loaded ({str(error).strip().splitlines()[0]}), expected one "
            "beside the model; correct the path, or save the tokenizer there"
        ) from error
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer {path!r}: got no chat template, expected one; use an instruction-tuned model")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {path!r}: got no EOS token, expected one; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def question(text: str, system_prompt: str | None = None) -> list[dict[str, str]]:
    """A conversation of one question, with a system prompt where there is one."""
    asked = {"role": "user", "content": text}
    return [asked] if system_prompt is None else [{"role": "system", "content": system_prompt}, asked]


def eos_token_ids(tokenizer: PreTrainedTokenizerBase, config: Any = None) -> frozenset[int]:
    """Every id that ends an answer: the tokenizer's EOS and those of a model or generation config.

    Llama-3 has several: <|eot_id|> ends a turn, <|end_of_text|> a text.
    """
    named = getattr(config, "eos_token_id", None)
    more = [named] if isinstance(named, int) else list(named or [])
    own = tokenizer.eos_token_id
    return frozenset([*more, own] if own is not None else more)


def eos_ids_of_model(tokenizer: PreTrainedTokenizerBase, path: str, revision: str | None = None) -> frozenset[int]:
    """`eos_token_ids` of a model folder or hub name: its generation config where it has one, else its config."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config: Any = GenerationConfig.from_pretrained(path, revision=revision or "main")
    except OSError:
        config = AutoConfig.from_pretrained(path, revision=revision)
    return eos_token_ids(tokenizer, config)


def single_token(tokenizer: PreTrainedTokenizerBase, stop: str, *, what: str = "rollout.stop") -> int:
    """The id of a stop token; `what` is the name that a refusal gives it.

    Raises:
        ValueError: the text is several tokens, or none.
    """
    ids = tokenizer.encode(stop, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{what}: got {stop!r}, which is {len(ids)} tokens, expected one; name a single token")
    return int(ids[0])


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer with ids beyond the model's embedding rows.

    Raises:
        ValueError: naming the highest id and the number of rows.
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise ValueError(
            f"tokenizer: got token ids up to {highest}, expected all below the model's {vocab_size} embedding rows; "
            "use the tokenizer that came with the model"
        )


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """Text without control tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids up to and including the generation prompt.

    Raises:
        ValueError: messages that are no conversation, that the template refuses, or that it starts with two BOS.
    """
    safe, spelt = _inert(tokenizer, messages)
    ids = _encode(tokenizer, _render(tokenizer, safe, add_generation_prompt=True), spelt)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise ValueError("chat template: got two BOS tokens in front, expected one; remove one from the template")
    return ids


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    eos_ids: frozenset[int] | None = None,
    train_on: Literal["all_turns", "last_turn"] = "all_turns",
    enough: int | None = None,
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation that ends with the assistant, and the mask of what it said.

    Args:
        messages: `{"role", "content"}`; the last one is the assistant's.
        eos_ids: from `eos_token_ids`; None takes the tokenizer's EOS alone.
        train_on: the assistant's turns that the mask covers.
        enough: once there are more ids than this, no further turn is encoded.

    Returns:
        ids (T), ending with the last turn's end token; response_mask (T), true on the content of every assistant
        turn (or the last) and on its end token.

    Raises:
        ValueError: the last message is not the assistant's; the template closes a turn without an EOS, or renders
            a turn differently once more follows.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError("conversation: got a last message that is not the assistant's, expected its answer; add one")
    ends = eos_token_ids(tokenizer) if eos_ids is None else eos_ids
    safe, spelt = _inert(tokenizer, messages)
    ids: list[int] = []
    mask: list[bool] = []
    done = ""  # the rendered text that `ids` stands for
    for index, message in enumerate(safe):
        if message["role"] != "assistant":
            continue
        if enough is not None and len(ids) > enough:
            break
        prompt = _render(tokenizer, safe[:index], add_generation_prompt=True)
        context = _continue(tokenizer, done, ids, _added(done, prompt), spelt)
        closed = _closed(tokenizer, _added(prompt, _render(tokenizer, safe[: index + 1])), ends)
        answer = _continue(tokenizer, prompt, ids + context, closed, spelt)
        ids += context + answer
        learnt = train_on == "all_turns" or index == len(safe) - 1
        mask += [False] * len(context) + [learnt] * len(answer)
        done = prompt + closed
    if mask[0]:
        raise ValueError("chat template: got an answer with nothing in front, expected its question; correct it")
    return ids, mask


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[bool]]:
    """Ids of a plain text with EOS at its end, and BOS in front where the tokenizer puts one there itself.

    Returns:
        ids (T); response_mask (T), true on all but the first, before which nothing stands.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    ids = [*starts, *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], eos]
    return ids, [False] + [True] * (len(ids) - 1)


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, answer: str, *, eos_ids: frozenset[int] | None = None
) -> tuple[list[int], list[int]]:
    """`(prompt_ids, response_ids)` of one answer to `messages`, its end token included.

    The prompt ids are those of `encode_prompt`, whatever the answer. Raises as `encode_conversation`.
    """
    ends = eos_token_ids(tokenizer) if eos_ids is None else eos_ids
    safe, spelt = _inert(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    prompt = _render(tokenizer, safe[:-1], add_generation_prompt=True)
    prompt_ids = _encode(tokenizer, prompt, spelt)
    closed = _closed(tokenizer, _added(prompt, _render(tokenizer, safe)), ends)
    return prompt_ids, _continue(tokenizer, prompt, prompt_ids, closed, spelt)


def eos_is_trained(tokenizer: PreTrainedTokenizerBase, *, eos_ids: frozenset[int] | None = None) -> bool:
    """Whether an encoded answer ends with an EOS that the mask includes: else a model never learns to stop."""
    ends = eos_token_ids(tokenizer) if eos_ids is None else eos_ids
    sample = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    try:
        ids, mask = encode_conversation(tokenizer, sample, eos_ids=ends)
    except ValueError:
        return False
    return mask[-1] and ids[-1] in ends


def check_messages(messages: Any) -> list[dict[str, str]]:
    """The messages as plain dicts.

    Raises:
        ValueError: not a list of `{"role", "content"}` with text in both.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        got = "an empty list" if messages in ([], ()) else type(messages).__name__
        raise ValueError(f"messages: got {got}, expected a list of role and content; correct it")
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str) or message.get("role") not in ROLES:
            raise ValueError(
                f"messages: got one with role {message.get('role')!r} and content of type {type(content).__name__}, "
                f"expected a role of {ROLES} and text; correct it"
                if isinstance(message, Mapping)
                else f"messages: got a {type(message).__name__}, expected an object with role and content; correct it"
            )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _continue(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], more: str, spelt: list[str]) -> list[int]:
    """Ids of `more` after `text`, which `ids` stands for.

    Difference of the whole's ids and `ids`; where a token would straddle the seam, `more` on its own: generation
    starts from `ids` too.
    """
    whole = _encode(tokenizer, text + more, spelt)
    return whole[len(ids) :] if whole[: len(ids)] == ids else _encode(tokenizer, more, spelt)


def _closed(tokenizer: PreTrainedTokenizerBase, turn: str, ends: frozenset[int]) -> str:
    """An assistant turn up to its end token. What the message says holds none: it is inert by now."""
    for match in _control_pattern(tokenizer).finditer(turn):
        if tokenizer.convert_tokens_to_ids(match.group()) in ends:
            return turn[: match.end()]
    names = tokenizer.convert_ids_to_tokens(sorted(ends))
    raise ValueError(
        f"chat template: got an assistant turn that no EOS closes (EOS: {names}), so stopping could not be learnt; "
        "make eos_token the template's end-of-turn token, or name that one in generation_config.json"
    )


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool = False) -> str:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"chat template: refuses the messages ({error}); correct their roles and order") from error
    return str(text)


def _added(before: str, after: str) -> str:
    if not after.startswith(before):
        raise ValueError(
            "chat template: got a conversation whose beginning is rendered differently once more follows, so no "
            "boundary between prompt and answer exists; use a template that only appends"
        )
    return after[len(before) :]


def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {str(token) for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted((name for name in names if name), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _inert(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[dict[str, str]], list[str]]:
    """The messages with spelt-out control tokens replaced by stand-ins, and what each stand-in is."""
    pattern = _control_pattern(tokenizer)
    spelt: list[str] = []

    def stand_in(match: re.Match[str]) -> str:
        spelt.append(match.group())
        return _BEGIN + _DIGIT * len(spelt) + _END

    checked = check_messages(messages)
    # The stand-in's own characters are control characters here, so a message cannot forge one.
    either = re.compile(f"[{_BEGIN}{_DIGIT}{_END}]|{pattern.pattern}")
    return [{**message, "content": either.sub(stand_in, message["content"])} for message in checked], spelt


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, spelt: list[str]) -> list[int]:
    ids: list[int] = []
    for index, piece in enumerate(re.split(f"{_BEGIN}({_DIGIT}+){_END}", text)):
        if not piece:
            continue
        if index % 2:
            ids += tokenizer(spelt[len(piece) - 1], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        else:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids
