"""``python -m evals CHECKPOINT``: score a run's latest checkpoint, or the one named."""

from __future__ import annotations

import argparse
import hashlib
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.config_files import nearest
from data_prep.errors import UserError, run_command
from data_prep.manifest import write_json

TASKS = ("perplexity", "positions")


def main() -> int:
    if sys.argv[1:2] == ["scaling"]:
        from evals.scaling.commands import main as scaling

        return scaling(sys.argv[2:])
    if sys.argv[1:2] == ["sample"]:
        from evals.sampling import main as sample

        return sample(sys.argv[2:])
    if sys.argv[1:2] == ["report"]:
        from evals.report.page import main as report

        return report(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m evals",
        description="Score a checkpoint. 'python -m evals scaling' fits scaling laws to runs, "
        "'report' makes a page of them, 'sample' continues a text.",
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
    parser.add_argument(
        "--factor", type=_positive, help="positions: up to so many times the training length (16)"
    )
    parser.add_argument("--sequences", type=_positive, help="positions: how many (8)")
    arguments = parser.parse_args()
    tasks = arguments.tasks.split(",")
    for task in tasks:
        if task not in TASKS:
            raise UserError(
                f"--tasks names '{task}'{nearest(task, TASKS)}, expected: {', '.join(TASKS)}"
            )

    from evals.model_loading import load_model
    from pretrain.parallel.processes import stop_processes

    averaged = arguments.weights == "ema"
    loaded = load_model(arguments.checkpoint, recurrences=arguments.recurrences, averaged=averaged)
    for task in tasks:
        result, given = _run(task, loaded, arguments)
        # Scores under other settings than the default ones get a file of their own.
        mark = "" if not any(given) else "-" + hashlib.sha256(repr(given).encode()).hexdigest()[:8]
        if arguments.recurrences is not None:
            mark = f"-recurrences-{arguments.recurrences}{mark}"
            result["recurrences"] = arguments.recurrences
        if averaged:
            mark, result["weights"] = f"-ema{mark}", "ema"
        path = loaded.evals_directory / f"{task}-{loaded.checkpoint.name}{mark}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, result)
        if task == "positions":
            from evals.positions import draw_positions

            _show_positions(
                result, str(path), str(draw_positions(result, path.with_suffix(".png")))
            )
        else:
            _show(result, str(path))
    stop_processes()
    return 0


def _run(
    task: str, loaded: Any, arguments: argparse.Namespace
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The result, and the settings that are not the default ones."""
    if task == "positions":
        from evals.positions import evaluate_positions

        factor, sequences = arguments.factor or 16, arguments.sequences or 8
        result = evaluate_positions(loaded, data=arguments.data, factor=factor, sequences=sequences)
        return result, (arguments.data, arguments.factor, arguments.sequences)
    from evals.perplexity import evaluate_perplexity

    result = evaluate_perplexity(
        loaded, data=arguments.data, window=arguments.window, stride=arguments.stride,
        max_tokens=arguments.max_tokens,
    )  # fmt: skip
    return result, (arguments.data, arguments.window, arguments.stride, arguments.max_tokens)


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


def _show_positions(result: dict[str, Any], path: str, picture: str) -> None:
    title = f"{result['checkpoint']}: {result['sequences']} sequences"
    table = Table(title=title, title_justify="left")
    for column in ("positions", "of the training length", "nats per token"):
        table.add_column(column, justify="right")
    for row in result["bins"]:
        table.add_row(
            f"{row['from']:,} to {row['to']:,}", f"{row['to'] / result['seq_len']:g}",
            f"{row['nats_per_token']:.4f}",
        )  # fmt: skip
    Console().print(table)
    if result["state_rms"]:
        at = result["positions_of_state_rms"].index(result["seq_len"])
        growth = {name: values[-1] / max(values[at], 1e-30)
                  for name, values in result["state_rms"].items()}  # fmt: skip
        name = max(growth, key=lambda n: growth[n])
        print(
            f"states at the end, as a share of their size at the training length: "
            f"{min(growth.values()):.3g} to {growth[name]:.3g} (block {name})"
        )
    print(f"written to {path} and {picture}")


if __name__ == "__main__":
    run_command(main)
