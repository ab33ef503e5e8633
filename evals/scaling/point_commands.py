"""``fit``, ``predict`` and ``plan`` with laws of sizes: tables with a row per run."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from evals.scaling.allocation import along_budget, best_allocation
from evals.scaling.arguments import columns_of, options_of, reading_of
from evals.scaling.curves import Points, points_of
from evals.scaling.fitting import Fit
from evals.scaling.intervals import bootstrap
from evals.scaling.outliers import Outlier, fit_without_outliers
from evals.scaling.outputs import written
from evals.scaling.point_intervals import outside, point_interval, refuse_unlike
from evals.scaling.readers import Reading, is_points_table, read_curves, read_points
from evals.scaling.size_laws import (
    SIZE_LAWS,
    DataConstrainedLaw,
    ExpertsLaw,
    frontier_exponents,
    isoflop_profiles,
    size_law,
)
from evals.scaling.tables import show_fit, show_size
from pretrain.common.errors import UserError
from pretrain.common.screen import readable, show_table, titled_table
from pretrain.run_arguments import expand_paths

MOST_PROFILES, MOST_OUTLIERS = 12, 8  # shown; all are in the JSON
# By option: the field of points, for laws that need it.
MORE = {"unique_tokens": DataConstrainedLaw, "total_parameters": ExpertsLaw}


def fit_points(given: argparse.Namespace, points: Points, console: Console) -> int:
    """Fit a law of sizes, name the outliers, and predict runs that were not fitted."""
    name = given.law or "chinchilla"
    if name not in SIZE_LAWS:
        raise UserError(
            f"{points.name} has one row per run, but --law is '{name}', expected one of "
            f"{', '.join(SIZE_LAWS)}"
        )
    tests = [points_from(source, given) for source in expand_paths(given.test)]
    if given.hold_out_largest:
        points, largest = without_largest(points)
        tests.append(largest)
    law = size_law(name, points)
    begun = time.perf_counter()
    found, outliers, left = fit_without_outliers(
        law, points, options_of(given, points=True), keep=given.keep_outliers
    )
    seconds = time.perf_counter() - begun
    if given.bootstrap:
        bootstrap(found, [left], given.bootstrap, given.seed)
    saved = found.to_json() | {
        "seconds": seconds,
        "outliers": [dataclasses.asdict(o) for o in outliers],
    }
    show_fit(found, console)
    show_outliers(outliers, len(points.loss), console)
    saved["tests"] = [show_predictions(found, test, console, logged=True) for test in tests]
    profiles = isoflop_profiles(left)
    if sum(p["inside"] for p in profiles) >= 2:
        saved["isoflop"] = {"profiles": profiles, "exponents": frontier_exponents(profiles)}
        _show_profiles(saved["isoflop"], console)
    from evals.scaling.figures import draw_points

    return written(given.out, "fit", saved, lambda to: draw_points(found, left, to))


def show_outliers(outliers: Sequence[Outlier], count: int, console: Console) -> None:
    """Name the runs that were left out, with the reason."""
    if not outliers:
        return
    each = "; ".join(f"{o.name} ({o.why})" for o in outliers[:MOST_OUTLIERS])
    if len(outliers) > MOST_OUTLIERS:
        each += f"; and {len(outliers) - MOST_OUTLIERS} more, see fit.json"
    console.print(
        f"{len(outliers)} of {count} runs were left out as outliers (--keep-outliers fits them "
        f"too): {each}",
        style="yellow",
    )


def points_from(source: Path, given: argparse.Namespace) -> Points:
    """Read a table of runs, or reduce a run directory or a loss curve to its end."""
    columns = columns_of(given.columns)
    if is_points_table(source, columns):
        return read_points(source, columns)
    reading = reading_of(given) if given.command == "fit" else Reading(columns)
    return points_of(read_curves([source], reading)[0])


def without_largest(points: Points) -> tuple[Points, Points]:
    """Return the runs without those of the largest size, and those.

    Raises UserError where there is one size alone.
    """
    largest = points.parameters.max()
    at = np.flatnonzero(points.parameters < largest)
    if not len(at):
        raise UserError(
            f"{points.name}: all runs have {largest:.3g} parameters, so that none are left to "
            "predict the largest from"
        )
    held = points.only(np.flatnonzero(points.parameters == largest))
    held.name = f"the largest size of {points.name}"
    return points.only(at), held


def show_predictions(
    found: Fit, points: Points, console: Console, *, logged: bool
) -> dict[str, Any]:
    """Print and return what a law predicts for runs, with 95 % intervals."""
    refuse_unlike(found, points)
    predicted, far = found.predict(points), outside(found.domain, points)
    ends: tuple[Any, Any] = (None, None)
    if found.samples is not None:
        ends = point_interval(found, points)
    columns = ["run", "parameters", "tokens", "predicted", "95 % interval", "logged", "error"]
    if not logged:
        columns = columns[:-2]
    if any(far):
        columns.append("extrapolates")
    table = titled_table(f"{found.law.title}: {points.name}", *columns, left=("extrapolates",))
    for i, name in enumerate(points.names):
        row = [name, readable(points.parameters[i], 4), readable(points.tokens[i], 4)]
        row.append(f"{predicted[i]:.4f}")
        row.append("" if ends[0] is None else f"{ends[0][i]:.4f} to {ends[1][i]:.4f}")
        if logged:
            error = 100 * (predicted[i] / points.loss[i] - 1)
            row += [f"{points.loss[i]:.4f}", f"{error:+.2f} %"]
        table.add_row(*row, *((far[i],) if any(far) else ()))
    show_table(table, console)
    saved: dict[str, Any] = {
        "name": points.name,
        "runs": list(points.names),
        "predicted": predicted.tolist(),
        "low": None if ends[0] is None else ends[0].tolist(),
        "high": None if ends[1] is None else ends[1].tolist(),
        "outside": far,
    }
    if logged:
        error = 100 * float(np.abs(predicted / points.loss - 1).mean())
        told = f"{points.name}: mean error {error:.3f} %"
        if ends[0] is not None:
            inside = (ends[0] <= points.loss) & (points.loss <= ends[1])
            told += f", {int(inside.sum())} of {len(inside)} runs inside their intervals"
        console.print(told)
        saved |= {"logged": points.loss.tolist(), "mean_error_percent": error}
    return saved


def predict_points(given: argparse.Namespace, found: Fit, console: Console) -> int:
    """Predict the loss at the given N and D, or of every run of a table."""
    asked = []
    if given.parameters is not None or given.tokens is not None:
        if given.parameters is None or given.tokens is None:
            missing = "--parameters" if given.parameters is None else "--tokens"
            raise UserError(
                f"predict with {found.law.title} needs both --parameters and --tokens; {missing} "
                "is missing"
            )
        asked.append((_point_of(given, found), False))
    asked += [(points_from(source, given), True) for source in expand_paths(given.run)]
    if not asked:
        raise UserError(
            f"predict with {found.law.title} needs --parameters and --tokens, or --run with a "
            "table of runs"
        )
    saved = [show_predictions(found, points, console, logged=seen) for points, seen in asked]
    from evals.scaling.allocation import draw_predictions

    return written(
        given.out,
        "prediction",
        {"fit": str(given.fit), "points": saved},
        lambda to: draw_predictions(found, [p for p, _ in asked], [s for _, s in asked], to),
    )


def _point_of(given: argparse.Namespace, found: Fit) -> Points:
    more: dict[str, Any] = {}
    for name, law in MORE.items():
        value = getattr(given, name)
        if isinstance(found.law, law):
            if value is None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{found.law.title} needs {option} for a prediction")
            more[name] = np.array([value])
        elif value is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is {value:g}, but {found.law.title} does not use it"
            )
    points = Points(
        np.array([given.parameters]), np.array([given.tokens]), np.ones(1), names=["asked"], **more
    )
    points.name = "predicted"
    return points


def plan_points(given: argparse.Namespace, found: Fit, console: Console) -> int:
    """Choose N and D for a budget, with a law whose optimum has no formula."""
    if given.flops is None:
        raise UserError("plan needs the budget, --flops, for a law of size and tokens")
    more: dict[str, float] = {}
    if isinstance(found.law, DataConstrainedLaw):
        if given.unique_tokens is None:
            raise UserError("plan needs --unique-tokens, how much data there is")
        more["unique_tokens"] = given.unique_tokens
    elif isinstance(found.law, ExpertsLaw):
        if given.experts_ratio is None or given.experts_ratio < 1:
            raise UserError(
                f"--experts-ratio is {given.experts_ratio}, expected the total parameters divided "
                "by the active ones, at least 1"
            )
        more["experts_ratio"] = given.experts_ratio
    size = best_allocation(found, given.flops, **more)
    show_size(size, console)
    if "unique_tokens" in more:
        console.print(f"{size.tokens / more['unique_tokens']:.2f} epochs")
    from evals.scaling.figures import draw_sizes

    return written(
        given.out,
        "plan",
        {"size": dataclasses.asdict(size)} | more,
        lambda to: draw_sizes(
            found, size, to, lambda sizes: along_budget(sizes, given.flops, **more)
        ),
    )


def _show_profiles(isoflop: dict[str, Any], console: Console) -> None:
    profiles, exponents = isoflop["profiles"], isoflop["exponents"]
    columns = ("FLOPs", "parameters", "tokens", "loss", "minimum")
    table = titled_table("isoFLOP profiles", *columns)
    for p in profiles[:: math.ceil(len(profiles) / MOST_PROFILES)]:
        table.add_row(
            f"{p['flops']:.3g}",
            f"{p['parameters']:.3g}",
            f"{p['tokens']:.3g}",
            f"{p['loss']:.4f}",
            "inside" if p["inside"] else "outside the runs",
        )
    show_table(table, console)
    console.print(f"N ~ C^{exponents['N']:.3f}, D ~ C^{exponents['D']:.3f}")
