"""Test scaling laws on held-out curves; exact recovery of a law; coverage of the intervals.

``python benchmarks/scaling_laws.py [FOLDER ...] [--fit NAME ...] [--coverage 200]``: each FOLDER
has CSV files with step, lr, loss of one size (tests/data/curves/csv_25 and csv_100). Schedules are
rebuilt from the files' names (see tests/data/curves/README.md), or interpolated for other names.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from evals.scaling import (
    CURVE_LAWS,
    SIZE_LAWS,
    Curve,
    Fit,
    Options,
    Points,
    Reading,
    bootstrap,
    curve_law,
    fit,
    read_curves,
    size_law,
)
from evals.scaling.intervals import mape
from evals.scaling.planning import planned_curve
from pretrain.config import ScheduleConfig

CURVES = Path(__file__).parents[1] / "tests/data/curves"
FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
# Mean absolute percentage errors with 7 parameters, from the repository of arXiv 2503.12811.
PUBLISHED = {"csv_25": 0.110, "csv_100": 0.142}


def schedule_of(name: str) -> str | None:
    """Return the schedule of a published curve by its name; None for other names."""
    kind, *numbers = name.split("_") if re.fullmatch(r"[a-z]+(_\d+)+", name) else [""]
    common = "lr=3e-4 warmup_steps=2160 final_ratio=0.1"
    n = [int(x) for x in numbers]
    if kind in ("constant", "cosine"):
        return f"kind={kind} steps={n[0]} {common}"
    if kind in ("wsd", "wsdld"):
        decay = "exponential" if kind == "wsd" else "linear"
        share = (n[1] - n[0]) / n[1]
        return f"kind=wsd decay={decay} steps={n[1]} decay_fraction={share!r} {common}"
    if kind == "wsdcon":
        drop = f"decay_fraction=0.5 final_ratio={n[0] / 30!r}"
        return f"kind=two_stage steps=16000 lr=3e-4 warmup_steps=2160 {drop}"
    return None


def read(folder: Path) -> dict[str, Curve]:
    found = {}
    for path in sorted(folder.glob("*.csv")):
        (curve,), _ = read_curves([path], Reading(schedule=schedule_of(path.stem)))
        found[curve.name] = curve
    return found


def held_out(curves: dict[str, Curve], fitted: tuple[str, ...], law: str) -> tuple[float, Fit]:
    chosen = [curves[name] for name in fitted]
    found = fit(curve_law(law, chosen), chosen)
    rest = [mape(found, c) for name, c in curves.items() if name not in fitted]
    return float(np.mean(rest)), found


def errors(folders: list[Path], fitted: tuple[str, ...]) -> None:
    print(f"fitted to {', '.join(fitted)}: mean absolute error on the others (%)")
    for folder in folders:
        curves = read(folder)
        missing = [name for name in fitted if name not in curves]
        if missing:
            raise SystemExit(f"{folder} has no {missing[0]}.csv; name the fitted curves with --fit")
        published = PUBLISHED.get(folder.name)
        print(
            f"{folder.name}" + (f", published multi-power law {published:.3f}" if published else "")
        )
        for law in CURVE_LAWS:
            begun = time.perf_counter()
            error, found = held_out(curves, fitted, law)
            seconds = time.perf_counter() - begun
            each = " ".join(
                f"{n} {mape(found, c):.3f}" for n, c in curves.items() if n not in fitted
            )
            print(
                f"  {law:12} {len(found.law.parameters)} parameters  {error:.4f}  "
                f"fit and predictions {seconds:.2f} s   {each}"
            )
        chosen = [curves[name] for name in fitted]
        law = next(iter(CURVE_LAWS))
        begun = time.perf_counter()
        found = fit(curve_law(law, chosen), chosen)
        alone = time.perf_counter() - begun
        bootstrap(found, chosen, 200)
        seconds = time.perf_counter() - begun - alone
        print(f"  {law}: one fit {alone:.2f} s, bootstrap of 200 {seconds:.1f} s")


def splits(folders: list[Path], longest: int = 30_000) -> None:
    """Fit to every three curves of up to ``longest`` steps, so that no single split decides."""
    print(f"\nfitted to any three curves of up to {longest:,} steps, the others predicted (%)")
    for folder in folders:
        curves = read(folder)
        short = [name for name, c in curves.items() if c.step[-1] <= longest]
        chosen = list(itertools.combinations(short, 3))
        for law in ("intrinsic", "annealing"):
            found = [held_out(curves, three, law)[0] for three in chosen]
            print(
                f"  {folder.name} {law:12} {len(chosen)} splits: mean {np.mean(found):.4f} "
                f"median {np.median(found):.4f} worst {max(found):.4f}"
            )


TRUTH = {"alpha": 0.3478, "beta": 0.3658, "E": 1.8172, "A": 482.01, "B": 2085.43}


def grid_of_runs(noise: float = 0.0, seed: int = 0) -> Points:
    """Return sizes and tokens like those of arXiv 2203.15556, with losses by the law and noise."""
    sizes, ratios = np.geomspace(44e6, 16e9, 16), np.geomspace(2, 200, 15)
    n, r = (x.ravel() for x in np.meshgrid(sizes, ratios))
    loss = TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * (n * r) ** -TRUTH["beta"]
    drawn = np.random.default_rng(seed).standard_normal(len(loss))
    return Points(n, n * r, loss * np.exp(noise * drawn))


def recovery() -> None:
    points = grid_of_runs()
    found = fit(size_law("chinchilla", points), [points], Options("log"))
    raw = found.law.derived(found.values)
    values = {**found.values, "A": raw["raw A"], "B": raw["raw B"]}
    listed = ", ".join(f"{k} {values[k]:.6g} (true {v})" for k, v in TRUTH.items())
    print(f"\nChinchilla from {len(points.loss)} noiseless runs: {listed}")


def true_fit(name: str) -> tuple[Fit, list[Any]]:
    """Return a law with known parameters and the runs that it is simulated on."""
    if name in CURVE_LAWS:
        schedules = (
            ScheduleConfig("cosine", 100),
            ScheduleConfig("constant", 100),
            ScheduleConfig("two_stage", 100, decay_fraction=0.5, final_ratio=0.3),
            ScheduleConfig("two_stage", 100, decay_fraction=0.25, final_ratio=0.1),
        )
        curves = [
            planned_curve(s, 1e-3, 3000, points=150, name=str(i)) for i, s in enumerate(schedules)
        ]
        law = curve_law(name, curves)
        values = {
            "intrinsic": [0.5, np.log(100.0), 0.75, 3.0, 0.6, 0.2],
            "annealing": [0.5, np.log(200.0), 3.0, 0.6, 0.8],
            "multi_power": [0.5, np.log(10.0), np.log(0.6), 0.4, 3.0, 0.6, 0.2],
        }[name]
        k = len(law.nonlinear)
        truth = Fit(law, np.array(values[:k]), np.array(values[k:]), 0, [], [], [], Options())
        return truth, curves
    points = grid_of_runs()
    points = points.only(range(0, len(points.loss), 4))
    points.unique_tokens = np.minimum(points.tokens, 2e10)
    points.total_parameters = points.parameters * np.resize(
        [1.0, 4.0, 16.0, 2.0, 8.0], len(points.loss)
    )
    law = size_law(name, points)
    values = {
        "chinchilla": [0.35, 0.37, 1.8, 0.3, 0.4],
        "compute": [0.15, 1.8, 0.7],
        "kaplan": [0.08, 0.1, 0.5, 3.0],
        "data_constrained": [0.35, 0.37, np.log(15.39), np.log(5.31), 0.43, 1.8, 0.7],
        "experts": [0.35, 0.37, 0.2, 0.01, 0.15, 0.02, 1.8, 0.3, 0.4],
    }[name]
    k = len(law.nonlinear)
    return Fit(law, np.array(values[:k]), np.array(values[k:]), 0, [], [], [], Options("log")), [
        points
    ]


def simulated(task: tuple[str, int, int]) -> np.ndarray:
    """Return which parameters' intervals cover the truth on one noisy data set."""
    name, seed, samples = task
    truth, runs = true_fit(name)
    generator = np.random.default_rng(seed)
    noisy = []
    for run in runs:
        noise = generator.standard_normal(len(run.loss))
        if name in CURVE_LAWS:  # neighbors are correlated: AR(1), 0.6
            for i in range(1, len(noise)):
                noise[i] = 0.6 * noise[i - 1] + 0.8 * noise[i]
        noisy.append(replace(run, loss=truth.predict(run) * np.exp(1e-3 * noise)))
    priors = name == "intrinsic"
    options = Options(truth.options.residual, huber=3e-3, priors=priors)
    if priors:  # what is assumed of parameters is true of them on average
        law, theta = truth.law, truth.theta.copy()
        for i, p in enumerate(law.nonlinear):
            if p.prior:
                low, high = law.bounds()[i]
                theta[i] = np.clip(generator.normal(*p.prior), low, high)
        truth.theta = theta
        noisy = [
            replace(new, loss=truth.predict(run) * new.loss / true_fit(name)[0].predict(run))
            for new, run in zip(noisy, runs, strict=True)
        ]
    found = bootstrap(fit(truth.law, noisy, options), noisy, samples, seed, processes=1)
    true = truth.values
    return np.array([low <= true[p] <= high for p, (low, high) in found.intervals.items()])


def coverage(count: int, samples: int, laws: list[str]) -> None:
    print(
        f"\n95 % intervals ({samples} bootstrap samples) that cover the truth, of {count} "
        "simulated data sets with 0.1 % noise (along curves: correlated, 0.6)"
    )
    for name in laws:
        begun = time.perf_counter()
        with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
            rows = list(pool.map(simulated, [(name, i, samples) for i in range(count)]))
        share = np.mean(rows, axis=0)
        law = true_fit(name)[0].law
        each = ", ".join(
            f"{p.name} {100 * s:.1f}" for p, s in zip(law.parameters, share, strict=True)
        )
        print(f"  {name:16} {each}   ({time.perf_counter() - begun:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--fit", nargs="+", default=FITTED)
    parser.add_argument("--splits", action="store_true")
    parser.add_argument("--coverage", type=int, default=0, metavar="DATA SETS")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--laws", nargs="+", default=[*CURVE_LAWS, *SIZE_LAWS])
    given = parser.parse_args()
    folders = given.folders or [CURVES / "csv_25", CURVES / "csv_100"]
    errors(folders, tuple(given.fit))
    if given.splits:
        splits(folders)
    recovery()
    if given.coverage:
        coverage(given.coverage, given.samples, given.laws)


if __name__ == "__main__":
    main()
