"""Choose a curve law: by held-out curves where there are enough, else by what is determined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t as student_t

from evals.scaling.annealing_laws import CURVE_LAWS
from evals.scaling.curves import Curve
from evals.scaling.fitting import LAST, Fit, Options, fit
from evals.scaling.intervals import mape
from evals.scaling.laws import curve_law
from evals.scaling.parameters import Law
from pretrain.common.errors import UserError

ENOUGH = 600  # losses of all curves together, to choose a law by
FOLDS = 6  # at most so many fits of each law hold something out
SURE = 0.95  # that another law is better than the default, to replace it
Sizes = tuple[bool, bool, bool]  # sized, size in annealing, size in progress


@dataclass
class HeldOut:
    """A law's errors on held-out curves in percent, by the curve's name.

    errors: mean absolute errors; ends: those of the last losses, with their sign; folds: the curves
    that were held out together, whose errors are alike.
    """

    law: str
    errors: dict[str, float]
    ends: dict[str, float]
    folds: list[list[str]]

    @property
    def mean(self) -> float:
        """The mean of the mean errors."""
        return float(np.mean(list(self.errors.values())))

    @property
    def end(self) -> float:
        """The mean size of the errors at the curves' ends."""
        return float(np.mean(np.abs(list(self.ends.values()))))


def hold_out_schedules(
    make: Callable[[Sequence[Curve]], Law], curves: Sequence[Curve], options: Options | None = None
) -> HeldOut:
    """Predict each curve from the others, holding out curves of one schedule together.

    Raises UserError for fewer than 3 schedules.
    """
    groups: dict[str, list[int]] = {}
    for i, curve in enumerate(curves):
        groups.setdefault(curve.schedule_key, []).append(i)
    if len(groups) < 3:
        raise UserError(
            f"there are {len(groups)} different schedules: expected at least 3 to choose a law by "
            "held-out schedules"
        )
    return _hold_out(make, curves, list(groups.values()), options)


def hold_out_sizes(
    make: Callable[[Sequence[Curve]], Law], curves: Sequence[Curve], options: Options | None = None
) -> HeldOut:
    """Predict each size from the others; raises UserError for fewer than 4 sizes."""
    groups: dict[float, list[int]] = {}
    for i, curve in enumerate(curves):
        groups.setdefault(curve.parameters or 0.0, []).append(i)
    if len(groups) < 4:
        raise UserError(
            f"there are {len(groups)} sizes: expected at least 4 to choose a law by held-out sizes"
        )
    return _hold_out(make, curves, list(groups.values()), options)


def _hold_out(
    make: Callable[[Sequence[Curve]], Law],
    curves: Sequence[Curve],
    groups: list[list[int]],
    options: Options | None,
) -> HeldOut:
    errors, ends, name = dict[str, float](), dict[str, float](), ""
    folds = list[list[str]]()
    for fold in range(min(FOLDS, len(groups))):
        group = [i for members in groups[fold::FOLDS] for i in members]
        rest = [c for i, c in enumerate(curves) if i not in group]
        law = make(rest)
        name, found = law.name, fit(law, rest, options)
        folds.append([curves[i].name for i in group])
        for i in group:
            errors[curves[i].name] = mape(found, curves[i])
            ends[curves[i].name] = end_error(found, curves[i])
    return HeldOut(name, errors, ends, folds)


def end_error(found: Fit, curve: Curve) -> float:
    """Return the error in percent of the predicted loss at a curve's end, with its sign."""
    return 100 * float((found.predict(curve)[-LAST:] / curve.loss[-LAST:] - 1).mean())


@dataclass
class LawChoice:
    """A chosen law, a sentence that says why, and what each law's held-out errors are."""

    law: str
    why: str
    held_out: list[HeldOut]


def choose_law(
    curves: Sequence[Curve], sizes: Sizes = (False, False, False), options: Options | None = None
) -> LawChoice:
    """Choose among the curve laws.

    With at least three schedules (or four sizes, for laws with N), each is predicted from the
    others. Where its memory is determined, a law replaces the default only if it is surely better
    at the curves' ends, as few held-out curves favor one law or another by chance; elsewhere the
    best one is chosen. With fewer schedules :func:`by_identifiability` decides.
    """

    def make(name: str) -> Callable[[Sequence[Curve]], Law]:
        return lambda chosen: curve_law(name, chosen, *sizes)

    hold_out = hold_out_sizes if any(sizes) else hold_out_schedules
    few = [_thinned(curve, max(20, ENOUGH // len(curves))) for curve in curves]
    chosen = by_identifiability(few, sizes, options)
    try:
        results = [hold_out(make(name), few, options) for name in CURVE_LAWS]
    except UserError:
        chosen.why = f"there are too few schedules to hold some out, and {chosen.why}"
        return chosen
    what = f"the ends of {len(results[0].folds)} held-out {'sizes' if any(sizes) else 'schedules'}"
    first, best = results[0], min(results, key=lambda r: r.end)
    if chosen.law == first.law:
        better = [r for r in results if _surely_better(r, first)]
        best = min(better, key=lambda r: r.end, default=first)
    others = ", ".join(f"{r.law} {r.end:.3f} %" for r in results if r is not best)
    rest = "no other law is" if best is first else "it is"
    why = (
        f"it predicts {what} with {best.end:.3f} % mean error, and {rest} surely better ({others})"
    )
    if chosen.law != first.law:
        why = f"it predicts {what} best, with {best.end:.3f} % mean error ({others})"
    return LawChoice(best.law, why, results)


def _surely_better(other: HeldOut, first: HeldOut) -> bool:
    """Return whether the ends' errors are smaller by more than chance, as a t-test tells."""
    gains = np.array(
        [np.mean([abs(first.ends[n]) - abs(other.ends[n]) for n in fold]) for fold in first.folds]
    )
    if len(gains) < 2:
        return False
    error = float(gains.std(ddof=1) / np.sqrt(len(gains)))
    return float(gains.mean()) > student_t.ppf(SURE, len(gains) - 1) * error


def _thinned(curve: Curve, most: int) -> Curve:
    """Return the curve with at most so many of its losses, the last one among them."""
    kept = np.unique(np.linspace(0, len(curve.step) - 1, most).round().astype(int))
    return replace(curve, step=curve.step[kept], loss=curve.loss[kept])


def by_identifiability(
    curves: Sequence[Curve], sizes: Sizes = (False, False, False), options: Options | None = None
) -> LawChoice:
    """Choose the default law, or the annealing law where nothing determines the default's memory.

    From smooth schedules alone the annealing law predicts others better.
    """
    default = next(iter(CURVE_LAWS))
    law = curve_law(default, curves, *sizes)
    found = fit(law, curves, options)
    if "memory" in law.doubts(found.values, [law.prepared(c) for c in curves]):
        why = f"nothing determines the memory of the {default} law, as no learning rate falls fast"
        return LawChoice("annealing", why, [])
    return LawChoice(default, "the curves determine its memory", [])
