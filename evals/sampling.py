"""``python -m evals sample MODEL --prompt TEXT``: print a continuation as it is generated."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from evals.completions import (
    OwnCompletion,
    add_sampling_options,
    check_utf8,
    open_writer,
    sampling_of,
)
from pretrain.common.errors import UserError
from pretrain.parallel.processes import stop_processes


def main(arguments: Sequence[str]) -> int:
    """Print a model's continuation of a prompt."""
    parser = argparse.ArgumentParser(
        prog="python -m evals sample", description="Continue a text with a model."
    )
    add_sampling_options(parser, max_tokens=256)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", default="", help="text to continue (a new document)")
    text.add_argument("--prompt-file", type=Path, help="UTF-8 text; - reads the standard input")
    given = parser.parse_args(arguments)
    sampling = sampling_of(given)
    check_utf8("--prompt", given.prompt or "")
    prompt = given.prompt if given.prompt_file is None else _read(given.prompt_file)
    writer = open_writer(given)
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
    stop_processes()
    return 0


def _read(path: Path) -> str:
    where = "the standard input" if str(path) == "-" else str(path)
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 at byte {error.start:,}; convert it first") from None
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
