"""Multiple choice: the letter, the letters or the option's own words that an answer settles on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from string import ascii_uppercase
from typing import Any

from rewards.base import only_rows
from rewards.reading import final_answer, plain

MAX_OPTION_PROMPT = 8_000
"""Options are looked for in the end of a prompt of at most so many characters."""

MAX_CUES = 64
"""Of "the answer is" and the like: an answer with more of them settles on nothing."""

_END = r"(?!'?[A-Za-z])"
_JOINT = r"(?:\s*(?:[,、&/+|]|和|与|或者?|还是|\band\b|\bor\b|\bvs\b))+\s*"
_LETTERS = rf"[(\[]?([A-Z](?:{_JOINT}[A-Z]{_END}|[A-Z])*){_END}(?:[)\]]|(?=$|[^)\]]))"
_SMALL = r"\(?([a-z])(?:\)(?=\s)|\)?(?=\s*[.。,，;!]?\s*(?:\n|$)))"
_OPEN = r"(?:[\s*_\"'`“‘「:$]|\\[(\[]|\\(?:text|textbf|mathrm|mathbf)\{)*"
_CUES = (
    r"(?:answer|choice|(?:correct|right|best|likely)\s+option)s?\b[*_\"'`]*"
    r"(?:\s+(?:is|are|would be|should be|must be)\b|\s*[:=]|\s+-\s)\s*(?:clearly |definitely |simply )?"
    r"(?:option|choice|letter)?"
    r"|\b(?:choose|select|pick|go with|opt for|answer with)\s+(?:option|choice|letter|answer)?"
    r"|\\boxed\{"
    r"|(?<!不是)(?:答案|正确选项)(?:应该|应当|应|就)?\s*(?:是|为|选|:|】|(?=[【「]))\s*【?\s*(?:选项)?"
    r"|(?<![不可挑勿])(?:选择|应选|故选|选)\s*[:]?\s*(?:选项)?"
)
_CUE = re.compile(f"(?:{_CUES}){_OPEN}", re.I)
_DENIED = re.compile(r"(?:\bnot|n't|\bnever|\bavoid|不要|别)\s*$", re.I)
"""In front of "choose B"."""
_CAPITAL = re.compile(_LETTERS)
_LOWER = re.compile(_SMALL)
_CALLED_RIGHT = re.compile(
    r"(?<![A-Za-z'])\(?([A-Z])\)?\*{0,2}\s*"
    r"(?:(?:is|are)\s+(?:also\s+)?(?:the\s+)?(?:right|correct|best|answer)\b|(?:项|选项)?\s*(?:也?是)?(?:正确|对的|最佳))"
)
_LEADING = re.compile(r"^[\s*_\"'(\[#>]*([A-Z])(?:[.):,、\]*]|\s*$|\s*\n)")
_LONE_LINE = re.compile(
    r"(?:^|\n)[ \t*_\"'`(\[]*(?:(?:[Oo]ption |[Cc]hoice |选项)[ \t*_\"'`(\[]*)?([A-Z])[ \t*_\"'`)\].。]*(?=\n|$)"
)
_LONE_SMALL = re.compile(r"[\s*_\"'`(]*([a-z])[\s*_\"'`).]*$")
_MARKER = re.compile(r"(?<![A-Za-z\d.'])([A-Z])[.):、]")
_ARTICLE = re.compile(r"\s+(?!because\b|since\b|as\b|for\b|is\b|and\b|or\b|due\b)[a-z]")
_EITHER = re.compile(r"\b(?:or|vs)\b|或|还是|[/|]")
_HEDGE = re.compile(
    r"[\W_]{0,8}?(?:\b(?:or|vs|versus|maybe|perhaps|possibly|alternatively)\b|或者?|还是|也?可能|[/|])"
    r"(?:[\s,(\[*_$\"'`“]|是|选项?|\b(?:or|maybe|perhaps|possibly|even|else|option|choice)\b)*",
    re.I,
)
"""Between an answer and another one."""
_GOLD = re.compile(r"^\W*([A-Za-z](?:\s*[,、]?\s*[A-Z])*)(?=[.):、,]|\s*$|\s)")
_SPACES = re.compile(r"[\W_]+")


def check_choice(*, prompt: str, answer: Any, choices: Any) -> bool:
    """Whether a row has letters to compare an answer with."""
    return bool(_gold(answer, _options(prompt, choices)))


@only_rows(check_choice)
def choice(
    prompts: list[str],
    responses: list[str],
    *,
    answer: list[Any],
    choices: list[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 where the answer settles on the letter (or the letters, in any order) of `answer`, else 0.

    Two statements that differ, more letters than the gold has, "A or B", and a letter beside another option's text
    settle on nothing. Reasoning in <think> is passed over.

    Args:
        answer: "C", "C. text", "ACD", or the words of an option.
        choices: the options of each row, a list or a mapping from letters; without it they are read off the prompt.

    Returns:
        None where the row has no letter to compare with, or one that none of its `choices` has.
    """
    given = choices or [None] * len(prompts)
    return [_score(*row) for row in zip(prompts, responses, answer, given, strict=True)]


def options_in(text: str) -> tuple[str, ...]:
    """The options of a question, each found by the next expected letter: their text may hold line breaks.

    Of several runs of letters the longest counts, of equals the last.
    """
    text = plain(text[-MAX_OPTION_PROMPT:])
    markers = [(found.group(1), found.start(), found.end()) for found in _MARKER.finditer(text)]
    best: list[tuple[str, int, int]] = []
    for first, marker in enumerate(markers):
        if marker[0] != "A":
            continue
        run = [marker]
        for one in markers[first + 1 :]:
            if ord(one[0]) == ord(run[-1][0]) + 1 and text[run[-1][2] : one[1]].strip():
                run.append(one)
        if len(run) >= max(2, len(best)):
            best = run
    ends = [start for _, start, _ in best[1:]] + [len(text)]
    return (
        tuple(text[marker[2] : end].strip().removesuffix("(").strip() for marker, end in zip(best, ends, strict=True))
        if best
        else ()
    )


def settled(response: str, options: Sequence[str] = (), *, several: bool = False) -> frozenset[str]:
    """The letters that a response settles on; none where it says nothing, or says different things.

    Args:
        several: whether letters next to each other ("ABD") are an answer of several.
    """
    text = final_answer(response)
    stated: list[frozenset[str]] = []
    cues = list(islice(_CUE.finditer(text), MAX_CUES + 1))
    if len(cues) > MAX_CUES:
        return frozenset()
    for cue in cues:
        if _DENIED.search(text, max(0, cue.start() - 12), cue.start()):
            continue
        if (letters := _after_cue(text, cue.end(), options, several)) is not None:
            stated.append(letters)
    stated += [frozenset(found.group(1)) for found in _CALLED_RIGHT.finditer(text)]
    if not stated:
        stated = _unstated(text, options)
    return stated[0] if len(set(stated)) == 1 else frozenset()


def _score(prompt: str, response: str, answer: Any, choices: Any) -> float | None:
    options = _options(prompt, choices)
    gold = _gold(answer, options)
    if not gold or not gold <= _letters(choices, options):
        return None
    return float(settled(response, options, several=len(gold) > 1) == gold)


def _options(prompt: str, choices: Any) -> tuple[str, ...]:
    if isinstance(choices, Mapping):
        return tuple(str(choices[key]) for key in sorted(choices))
    if isinstance(choices, str):
        return _parsed(choices)
    if isinstance(choices, Sequence) and choices:
        return tuple(str(one) for one in choices)
    return _parsed(prompt)


def _letters(choices: Any, options: Sequence[str]) -> frozenset[str]:
    """The letters that an answer may be: any where the options were only read off a text."""
    if isinstance(choices, str) or not choices:
        return frozenset(ascii_uppercase)
    named = {str(key).upper() for key in choices} if isinstance(choices, Mapping) else set()
    return frozenset({*ascii_uppercase[: len(options)], *named})


@lru_cache(maxsize=256)
def _parsed(text: str) -> tuple[str, ...]:
    # Every sample of one prompt asks for the same options.
    return options_in(text)


def _gold(answer: Any, options: Sequence[str]) -> frozenset[str]:
    if not isinstance(answer, str):
        return frozenset()
    if (letter := _named(answer, options)) is not None:
        return frozenset(letter)
    found = _GOLD.match(plain(answer))
    if found is None or (found.group(1).islower() and len(answer.strip()) > 1 and answer.strip()[1].isspace()):
        return frozenset()
    return frozenset(re.findall("[A-Z]", found.group(1).upper()))


def _after_cue(text: str, start: int, options: Sequence[str], several: bool) -> frozenset[str] | None:
    """What stands behind "the answer is": letters, or an option's text; None for something else."""
    found = _CAPITAL.match(text, start)
    named = re.findall("[A-Z]", found.group(1)) if found else []
    if found and len(named) > 1 and (several or not found.group(1).isalpha() or not found.group(1).isascii()):
        return _listed(found)
    if found and len(named) == 1:
        if named[0] in "AI" and _ARTICLE.match(text, found.end()):
            return None
        letter, end = named[0], found.end()
        if _beginning(text[end : end + 200].lstrip(" .:)-*]、\n"), options) not in (None, letter):
            return frozenset()
    elif not named and (small := _LOWER.match(text, start)):
        letter, end = small.group(1).upper(), small.end()
    # Capitals that touch are a word or an abbreviation where one letter is asked for.
    elif words := _beginning(text[start : start + 200], options):
        letter, end = words, start
    else:
        return None
    return frozenset() if _is_hedged(text[end : end + 200], letter, options) else frozenset(letter)


def _listed(found: re.Match[str]) -> frozenset[str]:
    """The letters of "A, B and D"; none of "A or B"."""
    return frozenset() if _EITHER.search(found.group(1)) else frozenset(re.findall("[A-Z]", found.group(1)))


def _is_hedged(rest: str, letter: str, options: Sequence[str]) -> bool:
    """Whether "or" and another letter, or another option's text, follow on the letter and its own text."""
    own = next((plain(one) for one in options[ord(letter) - ord("A") :]), "")
    place = rest.lower().find(own.lower())
    if own and 0 <= place <= 8:
        rest = rest[place + len(own) :]
    hedge = _HEDGE.match(rest)
    if hedge is None:
        return False
    other = _CAPITAL.match(rest, hedge.end())
    if other and not _ARTICLE.match(rest, other.end()):
        return other.group(1) != letter
    return _beginning(rest[hedge.end() :], options) not in (None, letter)


def _unstated(text: str, options: Sequence[str]) -> list[frozenset[str]]:
    """Without "the answer is": a letter in front, or one alone on its line, or an option in front by its text."""
    if lone := _LONE_SMALL.match(text):
        return [frozenset(lone.group(1).upper())]
    if listed := _CAPITAL.fullmatch(text.strip(" \n*_\"'`.。")):
        return [_listed(listed)]
    marked = {found.group(1) for found in _MARKER.finditer(text)}
    alone = {found.group(1) for found in _LONE_LINE.finditer(text)}
    leading = _LEADING.match(text)
    if leading and len(marked | alone | _listed(_CAPITAL.match(text, leading.start(1)) or leading)) == 1:
        rest = _beginning(text[leading.end() : leading.end() + 200].lstrip(" .:)-*]、\n"), options)
        return [frozenset(leading.group(1))] if rest in (None, leading.group(1)) else []
    if len(alone) == 1 and not marked - alone:
        return [frozenset(alone)]
    head = re.split(r"[.,;:\n。]", text.strip(" *_\"'\n"), maxsplit=1)[0]
    letter = _named(text[:1000], options) or _named(head[:1000], options)
    return [frozenset(letter)] if letter and not marked else []


def _named(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option whose words these are."""
    words = _words(text)
    fits = [index for index, option in enumerate(options) if words and _words(option) == words]
    return chr(ord("A") + fits[0]) if len(fits) == 1 and fits[0] < 26 else None


def _beginning(text: str, options: Sequence[str]) -> str | None:
    """The letter of the longest option that the text begins with."""
    if not options:
        return None
    words = f"{_words(text)} "
    fits = [(len(plain), index) for index, plain in enumerate(map(_words, options)) if plain and _starts(words, plain)]
    return chr(ord("A") + max(fits)[1]) if fits and max(fits)[1] < 26 else None


def _starts(words: str, option: str) -> bool:
    return words.startswith(option) and (words[len(option)] == " " or not option[-1].isascii())


@lru_cache(maxsize=1024)
def _words(text: str) -> str:
    return _SPACES.sub(" ", plain(text).lower()).strip()
