"""Give runs that branch off another one the learning rates of their trunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from evals.scaling.building import Built
from evals.scaling.curves import Curve
from evals.scaling.schedules import ASSUMED, GAPS
from pretrain.common.errors import UserError

ALIKE_LR, ALIKE_LOSS, SAME = 0.02, 0.02, 0.01  # shares of the peak, of the loss, of the peak


def join_branches(
    built: Sequence[Built], trunks: Mapping[str, str | None], known: Sequence[Curve] = ()
) -> None:
    """Complete the curves that begin in the middle, from the trunk that is named or found.

    trunks: by curve the name of its trunk, or NAME@STEP with the step after which it branches off;
    known: other curves that may be trunks. Raises UserError for a trunk that is none.
    """
    curves = {curve.name: curve for curve in known} | {b.curve.name: b.curve for b in built}
    ones = {b.curve.name: b for b in built}
    done = set[str]()

    def join(one: Built, waiting: tuple[str, ...]) -> None:
        curve, named = one.curve, trunks.get(one.curve.name)
        if curve.name in waiting:
            raise UserError(f"{curve.name}: it branches off itself, by way of {waiting[-1]}")
        if curve.name in done:
            return
        if named is not None:
            name, at = _named(named, curves, curve.name)
            if name in ones:
                join(ones[name], (*waiting, curve.name))
            begins = one.begins if one.begins is not None else int(curve.step[0])
            _take(one, curves[name], at or max(begins - one.apart // 2, 1), begins)
        elif one.begins is not None:
            _find_trunk(one, curves)
        done.add(curve.name)

    # A trunk begins before its branches, so it is complete before they look for it.
    for one in sorted(built, key=lambda b: b.begins or 0):
        join(one, ())


def _named(named: str, curves: Mapping[str, Curve], branch: str) -> tuple[str, int | None]:
    name, at, step = named.rpartition("@")
    if named in curves:
        return named, None
    if at and step.isdigit() and name in curves:
        return name, int(step)
    others = ", ".join(n for n in curves if n != branch)
    raise UserError(
        f"{branch}: it branches off '{named}', which no curve is called, expected one of {others}"
    )


def _take(one: Built, trunk: Curve, at: int, begins: int) -> None:
    """Replace the rates before step ``at`` by the trunk's, and from there to the first logged."""
    curve = one.curve
    if len(trunk.lr) < 0.98 * at:
        raise UserError(
            f"{curve.name}: it begins at step {begins:,}, but its trunk {trunk.name} is known up "
            f"to step {len(trunk.lr):,} only"
        )
    if at > begins:
        raise UserError(
            f"{curve.name}: it branches off at step {at:,}, expected at most {begins:,}, where its "
            "log begins"
        )
    curve.lr = curve.lr.copy()
    curve.lr[at:begins] = curve.lr[begins]
    curve.lr[:at] = trunk.lr[np.minimum(np.arange(at), len(trunk.lr) - 1)]
    curve.warmup = trunk.warmup
    curve.tokens_per_step = curve.tokens_per_step or trunk.tokens_per_step
    curve.parameters = curve.parameters or trunk.parameters
    curve.warnings = [w for w in curve.warnings if ASSUMED not in w]


def _find_trunk(one: Built, curves: Mapping[str, Curve]) -> None:
    """Take the history of a curve that is alike where this one begins, or note that none is."""
    curve, begins = one.curve, one.begins
    assert begins is not None
    at = max(begins - one.apart // 2, 1)
    alike, constant = list[Curve](), list[Curve]()
    for trunk in curves.values():
        sizes = {trunk.parameters, curve.parameters} - {None}
        early = trunk.step[0] < begins - GAPS * one.apart
        if not (early and len(trunk.lr) > begins and trunk.step[-1] >= at and len(sizes) < 2):
            continue
        loss = float(np.interp(curve.step[0], trunk.step, trunk.loss))
        if abs(loss / curve.loss[0] - 1) > ALIKE_LOSS:
            continue
        if abs(trunk.lr[begins] - curve.lr[begins]) <= ALIKE_LR * trunk.peak:
            alike.append(trunk)
        elif np.ptp(trunk.lr[trunk.warmup : begins]) <= SAME * trunk.peak:
            constant.append(trunk)  # that a branch with another rate leaves
    alike = alike or constant
    pasts = [trunk.lr[:at] for trunk in alike]
    if alike and all(np.abs(p - pasts[0]).max() <= SAME * alike[0].peak for p in pasts):
        _take(one, alike[0], at, begins)
        curve.warnings.append(
            f"it begins at step {begins:,} and has the learning rates of {alike[0].name} before, "
            "whose loss there is alike (change this with --branch-of)"
        )
    elif one.warmup_given and begins > curve.warmup + GAPS * one.apart:
        curve.warnings.append(
            f"it begins at step {begins:,}, and the steps from the warm-up to there are assumed to "
            "have its first learning rate (change this with --branch-of, if it is a branch)"
        )
