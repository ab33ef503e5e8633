"""Ladders of made-up arms, on which a rule can be tried as often as one likes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from evals.scaling.decide.observations import log_offset
from evals.scaling.decide.prior import BREAKS, NOISE_SPREAD, Prior
from evals.scaling.decide.runs import Run, Target

SIZES = (20e6, 60e6, 90e6, 150e6, 300e6, 530e6)
TARGET = Target(1e9, 1e11)
Kind = Literal["model", "laws", "equal", "turning"]

_CURVE = (0.8, 0.35, 0.2)  # E, and what falls, of the common curve, as tasks have them


def ladders(
    kind: Kind,
    prior: Prior,
    random: np.random.Generator,
    arms: Sequence[str] = ("a", "b"),
    *,
    sizes: Sequence[float] = SIZES,
    seeds: int = 3,
) -> tuple[list[Run], dict[str, float]]:
    """Return runs of every arm, size and seed, and the arms' true values at the target.

    ``model``: drawn from the prior; ``laws``: each arm has a power law of its own; ``equal``: all
    have the same; ``turning``: as ``model``, and 12 % of the arms turn in the last twelfth.
    """
    level, slope, wander, noise = np.exp(
        np.log(prior.medians) + np.array(prior.spreads) * random.standard_normal(4)
    )
    curves: dict[str, Callable[[Sequence[float]], np.ndarray]] = {}
    noises = {arm: noise * np.exp(NOISE_SPREAD * random.standard_normal()) for arm in arms}
    for arm in arms:
        if kind == "laws":
            curves[arm] = _own_law(random)
        elif kind == "equal":
            curves[arm] = lambda at: np.zeros(len(at))
        else:
            turn = 0.3 * random.choice([-1, 1]) if kind == "turning" else 0.0
            turn *= random.random() < 0.12
            breaks = BREAKS if random.random() < prior.breaking else 1.0
            curves[arm] = _drawn(random, level, slope, wander * breaks, turn)
    lengths = [size * TARGET.tokens / TARGET.parameters for size in sizes]
    places = [*zip(sizes, lengths, strict=True), (TARGET.parameters, TARGET.tokens)]
    computes = [n * d / (TARGET.parameters * TARGET.tokens) for n, d in places]
    runs, truth = [], {}
    for arm in arms:
        u = curves[arm](computes)
        for (size, length), c, gain in zip(places[:-1], computes[:-1], u[:-1], strict=True):
            for seed in range(seeds):
                error = noises[arm] * random.standard_normal()
                value = _value(c) - _slope(c) * (gain + error)
                runs.append(Run(arm, size, length, seed, float(value)))
        truth[arm] = float(_value(1.0) - _slope(1.0) * u[-1])
    return runs, truth


def _value(compute: float) -> float:
    constant, falling, exponent = _CURVE
    return float(constant + falling * compute ** (-exponent / 2))


def _slope(compute: float) -> float:
    _, falling, exponent = _CURVE
    return float(falling * exponent / 2 * compute ** (-exponent / 2))


def _drawn(
    random: np.random.Generator, level: float, slope: float, wander: float, turn: float
) -> Callable[[Sequence[float]], np.ndarray]:
    """Return a level, a trend and a wander away from the target, as the model has them."""
    at_target, trend = level * random.standard_normal(), slope * random.standard_normal(2)

    def u(computes: Sequence[float]) -> np.ndarray:
        found = np.zeros(len(computes))
        order = np.argsort(computes)[::-1]  # from the target down
        walk, before = np.zeros(2), np.zeros(2)
        for i in order:
            place = np.array(
                log_offset(
                    (TARGET.parameters * computes[i] ** 0.5, TARGET.tokens * computes[i] ** 0.5),
                    TARGET,
                )
            )
            walk = walk + wander * np.sqrt(np.abs(place - before)) * random.standard_normal(2)
            before = place
            late = max(0.0, 1 + np.log(computes[i]) / np.log(12))  # 0 at 1/12, 1 at the target
            found[i] = at_target + trend @ place + walk.sum() + turn * late
        return found

    return u


def _own_law(random: np.random.Generator) -> Callable[[Sequence[float]], np.ndarray]:
    """Return the gain, in units of the common curve's slope, of an arm with its own power law."""
    constant = _CURVE[0] + 0.01 * random.standard_normal()
    falling = _CURVE[1] * np.exp(0.05 * random.standard_normal())
    exponent = _CURVE[2] * np.exp(0.05 * random.standard_normal())

    def u(computes: Sequence[float]) -> np.ndarray:
        own = [constant + falling * c ** (-exponent / 2) for c in computes]
        return np.array([(_value(c) - y) / _slope(c) for c, y in zip(computes, own, strict=True)])

    return u
