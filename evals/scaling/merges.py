"""Merged checkpoints beside what a law predicts for the decays that they stand for.

An average of checkpoints with the weights w_0, ..., w_n is what a decay in stairs makes of the same
updates: those from checkpoint j - 1 to j with the share w_j + ... + w_n of the rate, see
:mod:`pretrain.merge.weights`. The law predicts by how much such a decay, really trained, would
lower the loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.scaling.annealing_laws import CURVE_LAWS
from evals.scaling.curves import Curve, end_of_warmup
from evals.scaling.extrapolating import outside_of
from evals.scaling.fitting import Fit, load_fit
from evals.scaling.intervals import ends_of
from evals.scaling.parameters import Array
from evals.scaling.schedules import (
    rates_of_equal_steps,
    run_lr,
    tokens_of_steps,
    tokens_per_step,
)
from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.common.screen import plain_console, show_table, titled_table
from pretrain.merge.command import MERGE_FILE
from pretrain.run_arguments import distinct_names, expand_paths
from pretrain.run_directory import RunDirectory


@dataclass
class Predicted:
    """A merge, and by how much a law says that its decay lowers the loss, in nats.

    ``interval`` is None for a fit without bootstrap samples; ``outside`` says in what respect the
    decay is outside the fitted runs.
    """

    name: str
    noted: dict[str, Any]
    gain: float
    interval: tuple[float, float] | None
    outside: str


def merge_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``merges``."""
    parser.add_argument("merges", nargs="+", help="directories that python -m pretrain merge made")
    parser.add_argument("--fit", type=Path, required=True, help="fit.json of a law of loss curves")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/scaling"), help="folder for merges.json"
    )


def read_merge(directory: Path) -> dict[str, Any]:
    """Return what a merge noted of itself; raises UserError for a directory of anything else."""
    try:
        noted = json.loads((directory / MERGE_FILE).read_bytes())
        steps, weights = list(noted["steps"]), list(noted["weights"])
        complete = len(steps) == len(weights) >= 2 and "validation" in noted
    except (OSError, ValueError, TypeError, KeyError):
        complete = False
    if not complete:
        raise UserError(
            f"{directory} holds no merge (no {MERGE_FILE} of one), expected a directory that "
            "python -m pretrain merge wrote"
        )
    return dict(noted)


def decay_of(lr: Array, steps: Sequence[int], weights: Sequence[float]) -> Array:
    """Return the learning rates ``lr`` up to the last step, with the decay that weights stand for.

    ``lr`` has one for every step of the trunk.
    """
    decayed = lr[: steps[-1]].copy()
    shares = np.cumsum(np.asarray(weights)[::-1])[::-1][1:]
    for (begin, end), share in zip(itertools.pairwise(steps), shares, strict=True):
        decayed[begin:end] *= share
    return decayed


def predict_merge(found: Fit, name: str, noted: dict[str, Any], directory: Path) -> Predicted:
    """Return the law's prediction for the decay that a merge stands for."""
    merged, trunk = RunDirectory(directory), RunDirectory(noted["run"])
    config = merged.read_config()
    lr, steps, batch = run_lr(config, trunk), noted["steps"], tokens_per_step(config.plan)
    tokens = tokens_of_steps(config.plan)
    if tokens is not None:  # a law's steps are of one size
        steps = np.round(tokens[steps] / batch).astype(int).tolist()
        lr = rates_of_equal_steps(tokens / batch, lr)
    sizes = trunk.read_model()
    flat = Curve(
        name,
        np.array([steps[-1]]),
        np.ones(1),
        lr[: steps[-1]],
        end_of_warmup(lr),
        float(sizes["parameters"]) if sizes else None,
        batch,
    )
    decayed = dataclasses.replace(flat, lr=decay_of(lr, steps, noted["weights"]))
    gain = float(found.predict(flat)[-1] - found.predict(decayed)[-1])
    ends = None
    if found.samples is not None:
        apart = found.predict_samples(flat)[:, -1] - found.predict_samples(decayed)[:, -1]
        low, high = ends_of(apart)
        ends = float(low), float(high)
    return Predicted(name, noted, gain, ends, outside_of(found, decayed))


def show_merges(given: argparse.Namespace) -> int:
    """Print and save a table of merges beside the law's predictions."""
    console, found = plain_console(width=160), load_fit(given.fit)
    if found.law.name not in CURVE_LAWS:
        raise UserError(f"{given.fit}: {found.law.title} is not a law of loss curves")
    paths = expand_paths(given.merges)
    every = [read_merge(path) for path in paths]
    names = distinct_names(paths)
    rows = [predict_merge(found, *each) for each in zip(names, every, paths, strict=True)]
    table = titled_table(
        f"merges, and what the {found.law.title.lower()} says of the decays they stand for (nats)",
        *("merge", "tokens", "last checkpoint", "merged", "gain", "law's gain", "95 % interval"),
    )
    for row in rows:
        validation = row.noted["validation"]
        measured = ["", "", ""]
        if validation is not None:
            (last, _), (merged, _) = validation["last"], validation["merged"]
            change, error = validation["difference"]
            measured = [f"{last:.4f}", f"{merged:.4f}", f"{-change:.4f} \u00b1 {error:.4f}"]
        interval = "" if row.interval is None else f"{row.interval[0]:.4f} to {row.interval[1]:.4f}"
        tokens = f"{row.noted['tokens']:,}"
        table.add_row(row.name, tokens, *measured, f"{row.gain:.4f}", interval)
    show_table(table, console)
    for name, doubt in found.undetermined.items():
        console.print(f"the fit does not determine {name}: {doubt}")
    for row in rows:
        if row.outside:
            console.print(f"{row.name}: extrapolates from the fitted runs: {row.outside}")
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "merges.json"
    write_json(path, {"fit": str(given.fit), "merges": [dataclasses.asdict(row) for row in rows]})
    console.print(f"written to {path}")
    return 0
