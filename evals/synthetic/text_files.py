"""``python -m evals.synthetic text NAME``: write problems with their answers, to train on."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from evals.synthetic.long_context import LONG_TASKS, make_texts
from evals.synthetic.text_problems import DEFAULT_LENGTH, PROBLEMS, make_problems
from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes
from pretrain.common.outputs import check_file
from pretrain.data.tokenizer import Tokenizer


def main(arguments: Sequence[str]) -> int:
    """Write generated problems with their answers as JSON lines."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.synthetic text",
        description="Write problems with their answers, one JSON line each, as a source for "
        "data_prep. They differ from the ones that 'python -m evals' scores.",
    )
    parser.add_argument("task", help=f"one of: {', '.join([*LONG_TASKS, *PROBLEMS])}")
    parser.add_argument("output", type=Path, help="a file, such as data/mqar.jsonl")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--length",
        type=int,
        help=f"elements of a problem ({DEFAULT_LENGTH}), or tokens of a long text (1024)",
    )
    parser.add_argument(
        "--tokenizer", help="tokenizer that measures long texts (without one, words are counted)"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.count < 1 or (given.length is not None and given.length < 1) or given.seed < 0:
        raise UserError("--count and --length are expected to be at least 1, --seed at least 0")
    check_file(given.output, "output")
    try:
        texts = _texts(given)
    except ValueError as error:
        raise UserError(str(error)) from None
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(given.output, lines.encode())
    print(f"{len(texts):,} texts of {given.task} written to {given.output}; the first ends:")
    print("  ..." + texts[0][-70:].replace("\n", "\n  "))
    return 0


def _texts(given: argparse.Namespace) -> list[str]:
    if given.task in PROBLEMS:
        problems = make_problems(
            given.task,
            count=given.count,
            length=given.length or DEFAULT_LENGTH,
            seed=given.seed,
            stream="train",
        )
        return [f"{p.prompt} {p.answer}" for p in problems]
    if given.task not in LONG_TASKS:
        near = difflib.get_close_matches(given.task, [*LONG_TASKS, *PROBLEMS], 1)
        raise UserError(
            f"no task '{given.task}'{f' (did you mean {near[0]}?)' if near else ''}; known: "
            f"{', '.join([*LONG_TASKS, *PROBLEMS])}"
        )
    texts = make_texts(
        given.task,
        count=given.count,
        length=given.length or 1024,
        tokens=_counter(given.tokenizer),
        seed=given.seed,
        stream="train",
    )
    return [f"{text.prompt} {', '.join(text.answers)}." for text in texts]


def _counter(tokenizer: str | None) -> Callable[[str], int]:
    if tokenizer is None:
        return lambda text: len(text.split())
    loaded = Tokenizer.load(tokenizer)
    return lambda text: len(loaded.encode(text))
