"""Print results as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pretrain.common.screen import show_table, titled_table


def show_perplexity(result: dict[str, Any], path: Path) -> None:
    """Print a result of :func:`evals.perplexity.evaluate_perplexity`, written to ``path``."""
    from evals.held_out import TRAINING_WINDOWS  # with torch, for which --help need not wait

    table = titled_table(f"{result['checkpoint']}: held-out text", "measure", "value")
    table.add_row("bits per byte", _with_error(result, "bits_per_byte"), style="bold")
    for directory, entropy in result["byte_entropy"].items():
        table.add_row(f"byte bigrams of {directory}", f"{entropy['bigram']:.4f}")
    table.add_row("nats per token", _with_error(result, "nats_per_token"))
    if len(result["sources"]) > 1:
        weighted = result["nats_per_token_by_training_weights"]
        table.add_row("nats per token, sources by weight", f"{weighted:.4f}")
    table.add_row("perplexity per token", f"{result['perplexity']:,.2f}")
    if depth := result.get("depth"):
        table.add_row("passes of a token", f"{depth['mean_passes']:.2f}")
        most = depth["flops_per_token_of_all_passes"] / 1e6
        used = f"{depth['flops_per_token'] / 1e6:,.2f} of {most:,.2f}"
        table.add_row("MFLOP of a token, of all passes", used)
    for quantity in ("documents", "tokens", "bytes"):
        table.add_row(quantity, f"{result[quantity]:,}")
    carried = result["carry_state"]
    table.add_row("tokens of a window" + carried * ", state carried", f"{result['window']:,}")
    if result["windows"] == TRAINING_WINDOWS:
        table.add_row("windows", "training's")
    elif not carried:
        table.add_row("tokens between windows", f"{result['stride']:,}")
    show_table(table)
    if len(result["sources"]) > 1:
        show_table(_sources(result["sources"]))
    print(f"written to {path}")


def _sources(sources: Sequence[dict[str, Any]]) -> Table:
    columns = ("source", "weight", "documents", "tokens", "nats per token", "bits per byte")
    table = titled_table("by source; weight: its share of the training samples", *columns)
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
    table = titled_table(title, "positions", "of the training length", "nats per token")
    for row in result["bins"]:
        table.add_row(
            f"{row['from']:,} to {row['to']:,}",
            f"{row['to'] / result['seq_len']:g}",
            f"{row['nats_per_token']:.4f}",
        )
    show_table(table)
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
    columns = (
        "task",
        "version",
        "shots",
        "documents",
        "metric",
        "score",
        "95 % interval",
        "chance",
    )
    table = titled_table(checkpoint, *columns, left=("metric",))
    for name, result in results.items():
        documents, all_documents = result["documents"], result["documents_of_task"]
        limited = result["limit"] is not None and documents != all_documents
        about = [
            name,
            _cell(result["version"]),
            _cell(result["num_fewshot"]),
            _cell(documents) + (f" of {all_documents:,}" if limited and documents else ""),
        ]
        for metric, value in result["scores"].items():
            ends, chance = result["intervals"].get(metric), result["chance"].get(metric)
            table.add_row(
                *about,
                metric,
                f"{value:.4f}",
                "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}",
                "" if chance is None else f"{chance:.4f}",
            )
            about = ["", "", "", ""]
    show_table(table)
    for name, result in results.items():
        if depth := result.get("depth"):
            print(
                f"{name}: {depth['mean_passes']:.2f} passes and "
                f"{depth['flops_per_token'] / 1e6:,.2f} MFLOP of a token, of "
                f"{depth['flops_per_token_of_all_passes'] / 1e6:,.2f} with all passes"
            )
        if result.get("cut_requests"):
            print(
                f"{name}: {result['cut_requests']:,} requests were longer than "
                f"{result['max_length']:,} tokens and lost their beginning (--max-length)"
            )
    print(f"written to {paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""))


def show_tasks(tasks: dict[str, list[str]]) -> None:
    """Print the names of tasks by kind."""
    table = titled_table("tasks that need no network", "kind", "names", left=("names",))
    table.show_header = False
    for kind, names in tasks.items():
        table.add_row(kind, ", ".join(names))
        table.add_section()
    show_table(table)
    print("Any other task of lm-eval works too if its data can be downloaded.")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
