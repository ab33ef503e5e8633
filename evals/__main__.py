"""``python -m evals CHECKPOINT``: score a run's latest checkpoint, or the one named."""

from __future__ import annotations

import argparse
import hashlib
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.errors import UserError, run_command
from data_prep.manifest import write_json

TASKS = ("perplexity",)


def main() -> int:
    if sys.argv[1:2] == ["scaling"]:
        from evals.scaling.commands import main as scaling

        return scaling(sys.argv[2:])
    if sys.argv[1:2] == ["report"]:
        from evals.report.page import main as report

        return report(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m evals",
        description="Score a checkpoint. 'python -m evals scaling' fits scaling laws to runs, "
        "'python -m evals report' makes a page of them.",
    )
    parser.add_argument("checkpoint", help="a run directory, or one of its checkpoints/step-N")
    parser.add_argument("--tasks", default="perplexity", help=f"of: {', '.join(TASKS)}")
    parser.add_argument("--data", help="a prepared directory; the run's own by default")
    parser.add_argument("--window", type=_positive, help="tokens seen at once (training length)")
    parser.add_argument("--stride", type=_positive, help="tokens the window moves on (half of it)")
    parser.add_argument(
        "--recurrences", type=_positive,
        help="passes through the loop of a recursive model (the configured number)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=("last", "ema"), default="last",
        help="of the last step, or averaged over steps by optimizer.ema_decay",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=_positive, help="stop after so many (all)")
    arguments = parser.parse_args()
    for task in arguments.tasks.split(","):
        if task not in TASKS:
            raise UserError(f"--tasks names '{task}', expected: {', '.join(TASKS)}")

    from evals.model_loading import load_model
    from pretrain.parallel.processes import stop_processes

    averaged = arguments.weights == "ema"
    loaded = load_model(arguments.checkpoint, recurrences=arguments.recurrences, averaged=averaged)
    from evals.perplexity import evaluate_perplexity

    result = evaluate_perplexity(
        loaded, data=arguments.data, window=arguments.window, stride=arguments.stride,
        max_tokens=arguments.max_tokens,
    )  # fmt: skip
    # Scores under other settings than the default ones get a file of their own.
    given = (arguments.data, arguments.window, arguments.stride, arguments.max_tokens)
    mark = "" if not any(given) else "-" + hashlib.sha256(repr(given).encode()).hexdigest()[:8]
    if arguments.recurrences is not None:
        mark = f"-recurrences-{arguments.recurrences}{mark}"
        result["recurrences"] = arguments.recurrences
    if averaged:
        mark, result["weights"] = f"-ema{mark}", "ema"
    path = loaded.evals_directory / f"perplexity-{loaded.checkpoint.name}{mark}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    _show(result, str(path))
    stop_processes()
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found '{text}', expected a whole number from 1")
    return int(text)


def _show(result: dict[str, Any], path: str) -> None:
    table = Table(title=f"{result['checkpoint']}: held-out text", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("bits per byte", f"{result['bits_per_byte']:.4f}", style="bold")
    for directory, entropy in result["byte_entropy"].items():
        table.add_row(f"byte bigrams of {directory}", f"{entropy['bigram']:.4f}")
    table.add_row("nats per token", f"{result['nats_per_token']:.4f}")
    table.add_row("perplexity per token", f"{result['perplexity']:.2f}")
    sizes = f"{result['documents']:,}, {result['tokens']:,}, {result['bytes']:,}"
    table.add_row("documents, tokens, bytes", sizes)
    table.add_row("window, stride", f"{result['window']:,}, {result['stride']:,}")
    Console().print(table)
    print(f"written to {path}")


if __name__ == "__main__":
    run_command(main)
