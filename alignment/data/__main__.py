"""`python -m alignment.data show FILE`: what a model would learn from a file of supervised rows."""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import get_args

from pydantic import ValidationError

from alignment.config import SftDataConfig, SftSourceConfig
from alignment.config.data import SftFormat, TrainOn
from alignment.data.chat import eos_ids_of_model, load_tokenizer
from alignment.data.model_assets import resolve_model
from alignment.data.show import MARKS, escaped, shown_rows


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line that says what was refused."""
    given = _parser().parse_args(arguments)
    color = sys.stdout is not None and sys.stdout.isatty() and not given.no_color and not os.environ.get("NO_COLOR")
    if isinstance(sys.stdout, io.TextIOWrapper):
        if not color and not _can_write(MARKS, sys.stdout.encoding):
            return _refuse(
                f"output: got {sys.stdout.encoding}, which has no {MARKS}, expected UTF-8: they say what is trained; "
                "set PYTHONIOENCODING=utf-8"
            )
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know fewer characters than the data
    name = given.file.removeprefix("asset:")
    if not name or not given.model:
        return _refuse("file, --model: got nothing, expected a name, asset:NAME or, for the file, a glob; name one")
    try:
        source = SftSourceConfig(
            **{"path" if name == given.file else "asset": name}, format=given.format, limit=given.rows
        )
        config = SftDataConfig(
            sources=(source,),
            system_prompt=given.system_prompt,
            max_tokens=given.max_tokens,
            train_on=given.train_on,
        )
        model = resolve_model(given.model)
        tokenizer = load_tokenizer(model)
        eos_ids = eos_ids_of_model(tokenizer, model)
        for text in shown_rows(config, tokenizer, eos_ids=eos_ids, color=color):
            print(text)
    except BrokenPipeError:
        # The reader has seen enough; nothing may be written to it when Python closes, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValidationError as error:
        return _refuse("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()))
    except ValueError as error:
        return _refuse(str(error))
    except OSError as error:  # a name too long for a file, or an output that takes no more
        return _refuse(
            f"{str(error.filename or 'output')[:60]}: got {error.strerror}, expected to read or write there"
        )
    return 0


def _can_write(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _refuse(reason: str) -> int:
    print(escaped(reason), file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m alignment.data", description=__doc__)
    show = parser.add_subparsers(required=True, metavar="show").add_parser(
        "show", help="print rows as tokens: trained green (or in ⟦ ⟧), the others dim"
    )
    show.add_argument("file", help="a file or glob, or asset:NAME")
    show.add_argument("--model", default="asset:smollm2-135m-instruct", help="folder, hub name or asset of a model")
    show.add_argument("--format", choices=get_args(SftFormat), default="auto")
    show.add_argument("--rows", type=_positive, default=3, help="how many, from the beginning")
    show.add_argument("--max-tokens", type=_positive, default=512)
    show.add_argument("--train-on", choices=get_args(TrainOn), default="all_turns")
    show.add_argument("--system-prompt")
    show.add_argument("--no-color", action="store_true", help="marks in place of colours")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 1; correct it")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
