"""How often the 95 % intervals hold the final loss of real curves that were not fitted.

``python benchmarks/scaling_coverage.py [FOLDER ...] [--laws intrinsic] [--samples 40]``: fits a law
to every three of the folder's curves, and predicts the last logged loss of each of the others. Also
prints the predicted lead of WSD over cosine against the measured one.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.scaling_laws import CURVES, read
from evals.scaling import Curve, bootstrap, curve_law, fit, interval

Row = tuple[str, float, float]  # held-out curve, error of the final loss, half of the interval


def held_out_ends(
    curves: dict[str, Curve], fitted: Iterable[str], law: str, samples: int
) -> list[Row]:
    """Return for each curve that was not fitted: error and half-width of the final log loss."""
    names = set(fitted)
    chosen = [c for n, c in curves.items() if n in names]
    found = bootstrap(fit(curve_law(law, chosen), chosen), chosen, samples, processes=1)
    rows = []
    for name, curve in curves.items():
        if name not in names:
            low, high = interval(found, curve, new_run=True)
            error = float(np.log(found.predict(curve)[-1] / curve.loss[-1]))
            rows.append((name, error, float(np.log(high[-1] / low[-1]) / 2)))
    return rows


def lead(curves: dict[str, Curve], fitted: Iterable[str], law: str, decay: str) -> float:
    """Return the predicted lead of a WSD curve over the cosine, as a multiple of the measured."""
    chosen = [curves[n] for n in fitted]
    found = fit(curve_law(law, chosen), chosen)
    cosine, wsd = curves["cosine_24000"], curves[decay]
    predicted = found.predict(cosine)[-1] - found.predict(wsd)[-1]
    return float(predicted / (cosine.loss[-1] - wsd.loss[-1]))


_read = functools.cache(read)


def _task(task: tuple[Path, tuple[str, ...], str, int]) -> list[Row]:
    folder, fitted, law, samples = task
    return held_out_ends(_read(folder), fitted, law, samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--laws", nargs="+", default=["intrinsic", "annealing"])
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--every", type=int, default=1, help="fit to every n-th choice of three")
    given = parser.parse_args()
    for law, folder in itertools.product(
        given.laws, given.folders or [CURVES / "csv_25", CURVES / "csv_100"]
    ):
        begun, curves = time.perf_counter(), _read(folder)
        splits = list(itertools.combinations(curves, 3))[:: given.every]
        with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
            tasks = [(folder, three, law, given.samples) for three in splits]
            rows = [row for found in pool.map(_task, tasks) for row in found]
        error, half = (np.array([r[i] for r in rows]) for i in (1, 2))
        inside = np.abs(error) <= half
        print(
            f"{folder.name} {law}: {len(splits)} fits to three curves, {len(rows)} final losses: "
            f"{100 * inside.mean():.1f} % in their 95 % intervals, which are +-"
            f"{100 * np.median(half):.2f} % (median; errors {100 * np.median(np.abs(error)):.2f} %,"
            f" mean {100 * np.mean(np.abs(error)):.3f} %)   ({time.perf_counter() - begun:.0f} s)"
        )
        for name in curves:
            at = np.array([r[0] == name for r in rows])
            print(
                f"  {name:18} {100 * inside[at].mean():5.1f} % of {at.sum()}, +-"
                f"{100 * np.median(half[at]):.2f} %, mean error {100 * error[at].mean():+.3f} %",
                flush=True,
            )
        for stage in [n for n in curves if n.startswith("wsdcon")]:
            fitted = ("constant_24000", "cosine_24000", stage)
            leads = [lead(curves, fitted, law, n) for n in ("wsd_20000_24000", "wsdld_20000_24000")]
            print(
                f"  lead over cosine_24000, fitted to {', '.join(fitted)}: "
                f"{leads[0]:.2f} (exponential decay), {leads[1]:.2f} (linear) x the measured"
            )


if __name__ == "__main__":
    main()
