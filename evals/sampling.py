"""``python -m evals sample MODEL --prompt TEXT``: print a continuation as it is generated."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from evals.completions import (
    HF,
    OwnCompletion,
    Sampling,
    add_sampling_options,
    check_utf8,
    open_writer,
    sampling_of,
)
from pretrain.common.errors import UserError
from pretrain.inference.load import LoadedModel
from pretrain.inference.speculate import Speculation
from pretrain.parallel.processes import stop_processes


def main(arguments: Sequence[str]) -> int:
    """Print a model's continuation of a prompt."""
    parser = argparse.ArgumentParser(
        prog="python -m evals sample", description="Continue a text with a model."
    )
    add_sampling_options(parser, max_tokens=256)
    parser.add_argument(
        "--speculate",
        metavar="K[:PASSES]",
        help="draft K tokens with the first passes of a loop (1) and check them with all: the same "
        "text as without, at --temperature 0",
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", default="", help="text to continue (a new document)")
    text.add_argument("--prompt-file", type=Path, help="UTF-8 text; - reads the standard input")
    given = parser.parse_args(arguments)
    sampling = sampling_of(given)
    check_utf8("--prompt", given.prompt or "")
    prompt = given.prompt if given.prompt_file is None else _read(given.prompt_file)
    if given.speculate is not None:
        sampling = _speculating(given, sampling)
    writer = open_writer(given)
    if sampling.speculation is not None and isinstance(writer.model, LoadedModel):
        sampling.speculation.check(writer.model.model)
    completion = writer.complete(writer.prompt_ids(prompt), sampling)
    seen = writer.training_length
    if seen is not None and len(completion.prompt_ids) + given.max_tokens > seen:
        print(
            f"note: the prompt's {len(completion.prompt_ids):,} tokens and --max-tokens exceed the "
            f"training length of {seen:,}; nothing is cut",
            file=sys.stderr,
        )
    print(prompt, end="", flush=True)
    begun = time.perf_counter()
    for piece in completion:
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - begun
    print()
    print(
        f"{completion.tokens} tokens after a prompt of {len(completion.prompt_ids)}, "
        f"{completion.tokens / seconds:,.1f} tokens/s, ended by {completion.reason}",
        file=sys.stderr,
    )
    if isinstance(completion, OwnCompletion) and completion.report is not None:
        print(completion.report.describe(), file=sys.stderr)
    if sampling.speculation is not None and isinstance(completion, OwnCompletion):
        print(completion.drafts, file=sys.stderr)
    if depth := writer.depth():
        print(depth, file=sys.stderr)
    stop_processes()
    return 0


def _speculating(given: argparse.Namespace, sampling: Sampling) -> Sampling:
    """Return sampling with drafts. Raises UserError where they cannot be."""
    speculation = Speculation.parse(given.speculate)
    what = f"--speculate is {speculation}, which"
    if given.checkpoint.startswith(HF):
        raise UserError(f"{what} is for checkpoints of runs, not for {given.checkpoint}")
    if sampling.temperature > 0:
        raise UserError(f"{what} gives greedy texts, but --temperature is {sampling.temperature}")
    if given.exit is not None:
        raise UserError(f"{what} checks drafts with all passes, but --exit is {given.exit}")
    return dataclasses.replace(sampling, speculation=speculation)


def _read(path: Path) -> str:
    where = "the standard input" if str(path) == "-" else str(path)
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 at byte {error.start:,}; convert it first") from None
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
