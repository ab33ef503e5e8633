"""How large differences, trends, wanders and noise are expected to be before anything is run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from evals.scaling.decide.curve import Array

FREE_EFFECT = 1.5  # standard deviation of what a size and length does to all arms
BREAKS = 5.0  # factor on the wander of an arm that breaks its trend
NOISE_SPREAD = 0.6  # of the logarithm of an arm's noise

_DRAWS, _ARMS = 128, 8  # draws, which double with every doubling of the arms beyond these


@dataclass(frozen=True)
class Prior:
    """Medians and log standard deviations of level, slope, wander and noise, in u.

    ``breaking`` is the share of arms that break the trend: 12 % of corpora, 4 % of other arms.
    """

    name: str
    medians: tuple[float, float, float, float]
    spreads: tuple[float, float, float, float]
    breaking: float = 0.04

    def for_data(self) -> Prior:
        """Return the prior for arms that are corpora, which cross more often."""
        return replace(self, breaking=0.12)


TASK = Prior("task", (0.5, 0.08, 0.12, 0.10), (0.7, 0.8, 0.8, 0.9))
LOSS = Prior("loss", (0.4, 0.06, 0.06, 0.03), (0.8, 0.9, 0.9, 0.9))
PRIORS = {"task": TASK, "loss": LOSS}


def draws_for(arms: int) -> int:
    """Return how many draws are made: every arm has kinds of its own to be drawn."""
    return int(_DRAWS * 2 ** max(0, math.ceil(math.log2(arms / _ARMS))))


@lru_cache(maxsize=64)
def uniforms(dimensions: int, stream: int, count: int) -> Array:
    """Return quasi-random points of the unit cube, the same ones in every process."""
    from scipy.stats import qmc

    points = qmc.Sobol(dimensions, scramble=True, seed=stream).random(count)
    return np.clip(points, 1e-9, 1 - 1e-9)


@lru_cache(maxsize=64)
def normals(dimensions: int, stream: int, count: int) -> Array:
    """Return quasi-random standard normal points."""
    from scipy.special import ndtri

    found: Array = ndtri(uniforms(dimensions, stream, count))
    return found


@lru_cache(maxsize=8)
def kinds_of_arms(breaking: float) -> tuple[Array, Array, Array]:
    """Return the factors on wander and on noise that an arm may have, and their probabilities."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    wander = np.repeat([1.0, BREAKS], len(nodes))
    noise = np.tile(np.exp(NOISE_SPREAD * nodes), 2)
    chance = np.concatenate([(1 - breaking) * weights, breaking * weights])
    return wander, noise, chance
