"""Hold the laws of tables of runs against public ladders: ``python benchmarks/scaling_tables.py``.

The largest runs are predicted from the smaller ones, with 95 % intervals: losses, losses by way of
whole curves, accuracies, one loss from another, and losses of runs with repeated data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas

from evals.scaling import (
    Curve,
    Pairs,
    RunTable,
    bootstrap,
    fit,
    fit_downstream,
    interval,
    loss_to_loss_law,
    predict,
    read_points,
)
from evals.scaling.parameters import Array
from evals.scaling.point_intervals import point_interval
from evals.scaling.schedules import schedule_lr
from pretrain.config import ScheduleConfig

LADDER = Path(__file__).parent / "data/ladder"
FINAL = LADDER / "olmo_ladder_final.csv"
# The ladder's rule (arXiv 2412.04403): a peak of 0.0047 at 108M parameters, falling with the cube
# root; the warm-up takes as many tokens as there are parameters.
PEAK, PEAK_SIZE = 0.0047, 108e6


def told(name: str, predicted: Array, low: Array, high: Array, logged: Array) -> tuple[int, int]:
    """Print errors and how many runs lie inside their intervals, which is returned."""
    inside = (low <= logged) & (logged <= high)
    error = 100 * np.abs(predicted / logged - 1)
    print(
        f"  {name:34} mean error {error.mean():5.2f} %  largest {error.max():5.2f} %  intervals "
        f"+- {100 * np.mean((high - low) / 2 / predicted):5.2f} %  {inside.sum()} of {len(inside)} "
        "inside",
        flush=True,
    )
    return int(inside.sum()), len(inside)


def summed(counts: Sequence[tuple[int, int]]) -> None:
    inside, all_of = (sum(x) for x in zip(*counts, strict=True))
    print(f"  inside their intervals: {inside} of {all_of}")


def final_losses(columns: Sequence[str], samples: int) -> None:
    print("\nOLMo ladder: losses of the 1B runs by the Chinchilla law of 190M to 760M")
    counts = []
    for column in columns:
        points = read_points(FINAL, {"loss": column})
        large = points.parameters > 1e9
        found = fit("chinchilla", points.only(np.flatnonzero(~large)), samples=samples)
        table = predict(found, points.only(np.flatnonzero(large)))
        predicted, low, high = (table[c].to_numpy() for c in ("predicted", "low", "high"))
        counts.append(told(column, predicted, low, high, points.loss[large]))
    summed(counts)


def ladder_curves() -> list[Curve]:
    """Return the ladder's curves after twice their warm-up, with the schedules of its rule."""
    logged, curves = pandas.read_csv(LADDER / "olmo_ladder_curves.csv"), []
    final = pandas.read_csv(FINAL)
    for name, steps, size, tokens in final[["name", "step", "parameters", "tokens"]].to_numpy():
        rows = logged[(logged.name == name) & (logged.step <= steps)].sort_values("step")
        per_step = tokens / steps
        warmup = int(size / per_step)
        rows = rows[rows.step >= 2 * warmup]
        schedule = ScheduleConfig("cosine", warmup, final_ratio=0.01)
        lr = schedule_lr(schedule, PEAK * (size / PEAK_SIZE) ** (-1 / 3), int(steps))
        step = rows.step.to_numpy(dtype=np.int64)
        curves.append(Curve(name, step, rows.c4_en_ce.to_numpy(), lr, warmup, size, per_step))
    return curves


def whole_curves(samples: int) -> None:
    print("\nOLMo ladder: C4 losses of the 1B runs by the joint law of the curves of 190M to 760M")
    curves = ladder_curves()
    small = [c for c in curves if (c.parameters or 0) < 1e9]
    found = fit("intrinsic", small, samples=0)
    bootstrap(found, small, samples)
    print("  " + ", ".join(f"{k} {v:.4g}" for k, v in found.values.items()))
    counts = []
    for curve in curves:
        if (curve.parameters or 0) > 1e9:
            low, high = interval(found, curve)
            predicted = found.predict(curve)
            error = 100 * np.abs(predicted / curve.loss - 1).mean()
            name = f"{curve.name}: curve {error:.2f} %, its end:"
            last = [x[-1:] for x in (predicted, low, high, curve.loss)]
            counts.append(told(name, *last))
    summed(counts)


def accuracies(samples: int) -> None:
    print("\nOLMo ladder: accuracies of the 1B runs from the losses of 190M to 760M")
    table, counts = RunTable(FINAL), []
    large = table.numbers("parameters") > 1e9
    for column in table.frame.columns:
        if column.endswith("_bpb"):
            task = column.removesuffix("_bpb")
            points, scores = table.points(column), table.numbers(f"{task}_acc")
            small = np.flatnonzero(~large)
            law = fit_downstream(task, points.only(small), scores[~large], samples=samples)
            at = points.only(np.flatnonzero(large))
            low, high = law.interval(at)
            counts.append(told(task, law.predict(at)[1], low, high, scores[large]))
    summed(counts)


def translations(columns: Sequence[str], samples: int) -> None:
    print("\nOLMo ladder: losses of the 1B runs from their C4 loss, by the others'")
    table, counts = RunTable(FINAL), []
    large = table.numbers("parameters") > 1e9
    source = table.numbers("c4_en_ce")
    for column in columns:
        target = table.numbers(column)
        pairs = Pairs(source[~large], target[~large])
        found = fit(loss_to_loss_law(pairs), pairs, samples=samples)
        at = Pairs(source[large], target[large])
        low, high = point_interval(found, at)
        counts.append(told(column, found.predict(at), low, high, at.loss))
    summed(counts)


def repeated_data(samples: int) -> None:
    print("\ndatablations: the largest size from the others, where epochs did no harm")
    points = read_points(LADDER / "datablations_final.csv")
    every = fit("data_constrained", points, samples=samples)
    dropped = {w.partition(":")[0] for w in every.warnings}
    print(f"  {len(dropped)} of {len(points.loss)} runs left out; of the others:")
    for name in ("R_D", "R_N", "alpha", "beta", "E"):
        low, high = every.intervals[name]
        print(f"    {name} {every.values[name]:.4g} ({low:.4g} to {high:.4g})")
    kept = points.only([i for i, n in enumerate(points.names) if n not in dropped])
    large = kept.parameters == kept.parameters.max()
    found = fit("data_constrained", kept.only(np.flatnonzero(~large)), samples=samples)
    table = predict(found, kept.only(np.flatnonzero(large)))
    predicted, low, high = (table[c].to_numpy() for c in ("predicted", "low", "high"))
    told(f"{kept.parameters.max():.3g} parameters", predicted, low, high, kept.loss[large])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100, help="of the bootstrap")
    given = parser.parse_args()
    columns = ("c4_en_ce", "pile_ce", "wikitext_103_ce", "dolma_stack_ce")
    final_losses(columns, given.samples)
    whole_curves(min(given.samples, 20))
    accuracies(given.samples)
    translations(columns[1:], given.samples)
    repeated_data(given.samples)


if __name__ == "__main__":
    main()
