"""Print results as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show_perplexity(result: dict[str, Any], path: Path) -> None:
    """Print a result of :func:`evals.perplexity.evaluate_perplexity`, written to ``path``."""
    table = Table(title=f"{result['checkpoint']}: held-out text", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("bits per byte", _with_error(result, "bits_per_byte"), style="bold")
    for directory, entropy in result["byte_entropy"].items():
        table.add_row(f"byte bigrams of {directory}", f"{entropy['bigram']:.4f}")
    table.add_row("nats per token", _with_error(result, "nats_per_token"))
    if len(result["sources"]) > 1:
        weighted = result["nats_per_token_by_training_weights"]
        table.add_row("nats per token, sources by weight", f"{weighted:.4f}")
    table.add_row("perplexity per token", f"{result['perplexity']:.2f}")
    sizes = f"{result['documents']:,}, {result['tokens']:,}, {result['bytes']:,}"
    table.add_row("documents, tokens, bytes", sizes)
    if result["carry_state"]:
        table.add_row("window, state carried", f"{result['window']:,}")
    else:
        table.add_row("window, stride", f"{result['window']:,}, {result['stride']:,}")
    Console().print(table)
    if len(result["sources"]) > 1:
        Console().print(_sources(result["sources"]))
    print(f"written to {path}")


def _sources(sources: Sequence[dict[str, Any]]) -> Table:
    title = "by source; weight: its share of the training samples"
    table = Table(title=title, title_justify="left")
    table.add_column("source", overflow="fold")
    for column in ("weight", "documents", "tokens", "nats per token", "bits per byte"):
        table.add_column(column, justify="right")
    for source in sources:
        table.add_row(
            source["source"],
            f"{source['weight']:.1%}",
            f"{source['documents']:,}",
            f"{source['tokens']:,}",
            _with_error(source, "nats_per_token"),
            _with_error(source, "bits_per_byte"),
        )
    return table


def _with_error(result: dict[str, Any], name: str) -> str:
    """Return a score with its standard error, where it is that of a sample."""
    value, error = result[name], result["stderr"][name]
    if value is None:
        return ""
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def show_positions(result: dict[str, Any], path: Path, picture: Path) -> None:
    """Print a result of :func:`evals.positions.evaluate_positions`, written to ``path``."""
    title = f"{result['checkpoint']}: {result['sequences']} sequences"
    table = Table(title=title, title_justify="left")
    for column in ("positions", "of the training length", "nats per token"):
        table.add_column(column, justify="right")
    for row in result["bins"]:
        table.add_row(
            f"{row['from']:,} to {row['to']:,}",
            f"{row['to'] / result['seq_len']:g}",
            f"{row['nats_per_token']:.4f}",
        )
    Console().print(table)
    if result["state_rms"]:
        at = result["positions_of_state_rms"].index(result["seq_len"])
        growth = {
            name: values[-1] / max(values[at], 1e-30)
            for name, values in result["state_rms"].items()
        }
        name = max(growth, key=lambda n: growth[n])
        print(
            f"states at the end, as a share of their size at the training length: "
            f"{min(growth.values()):.3g} to {growth[name]:.3g} (block {name})"
        )
    print(f"written to {path} and {picture}")


def show_scores(checkpoint: str, results: dict[str, dict[str, Any]], paths: Sequence[Path]) -> None:
    """Print the results of lm-eval's tasks by name, written to ``paths``."""
    table = Table(title=checkpoint, title_justify="left")
    table.add_column("task")
    for column in ("version", "shots", "documents"):
        table.add_column(column, justify="right")
    table.add_column("metric")
    table.add_column("score", justify="right")
    for name, result in results.items():
        about = [
            name,
            _cell(result["version"]),
            _cell(result["num_fewshot"]),
            _cell(result["documents"]),
        ]
        for metric, value in result["scores"].items():
            error = result["stderr"].get(metric)
            shown = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
            table.add_row(*about, metric, shown)
            about = ["", "", "", ""]
    Console().print(table)
    for name, result in results.items():
        if result.get("cut_requests"):
            print(
                f"{name}: {result['cut_requests']:,} requests were longer than "
                f"{result['max_length']:,} tokens and lost their beginning (--max-length)"
            )
    print(f"written to {paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""))


def show_tasks(tasks: dict[str, list[str]]) -> None:
    """Print the names of tasks by kind."""
    table = Table(show_header=False, title="tasks that need no network", title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for kind, names in tasks.items():
        table.add_row(kind, ", ".join(names))
        table.add_section()
    Console().print(table)
    print("Any other task of lm-eval works too if its data can be downloaded.")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
