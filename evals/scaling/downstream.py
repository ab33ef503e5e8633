"""Predict a task's accuracy in two steps: loss on the right answers, then a sigmoid of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from evals.scaling.curves import Points
from evals.scaling.fitting import Fit, Options, fit
from evals.scaling.intervals import bootstrap, ends_of
from evals.scaling.parameters import Array
from evals.scaling.size_laws import size_law
from pretrain.common.errors import UserError

NAMES = ("low", "high", "slope", "middle")
SOFT = 0.01  # errors of accuracies beyond which they count less
DRAWS = 25  # of the scatter of runs, for each bootstrap sample
CEILING = (1.0, 0.1)  # what is assumed of the best accuracy: runs far below it say nothing of it


@dataclass
class Downstream:
    """A fitted two-step law of one task (Bhagia et al., arXiv 2412.04403).

    Step one is Chinchilla's law of the task's loss; step two accuracy = low + (high - low) / (1 +
    exp(slope (loss - middle))) with ``values`` in this order. ``spread`` is the standard deviation
    of accuracies around the sigmoid, with ``free`` degrees of freedom, ``samples`` (m, 4) those of
    its bootstrap, ``losses`` the range of the task losses.
    """

    task: str
    first: Fit
    values: Array
    spread: float
    samples: Array
    losses: tuple[float, float]
    free: int
    seed: int = 0
    source: str = field(default="arXiv 2412.04403", init=False)

    def predict(self, points: Points) -> tuple[Array, Array]:
        """Return the predicted task loss and accuracy (n,) of runs."""
        loss = self.first.predict(points)
        return loss, sigmoid(self.values, loss)

    def interval(self, points: Points) -> tuple[Array, Array]:
        """Return the low and high ends (n,) of the accuracies' 95 % intervals.

        They hold the error of the first step's law, and the scatter of runs around both steps.
        """
        generator = np.random.default_rng(self.seed)
        assert self.first.error is not None
        logs = np.log(np.maximum(self.first.predict_samples(points), 1e-12))
        drawn = []
        for values, row in zip(self.samples, logs, strict=True):
            shape = (DRAWS, len(row))
            scatter = self.first.error.noise * generator.standard_t(self.free, shape)
            scores = sigmoid(values, np.exp(row + scatter))
            drawn.append(scores + self.spread * generator.standard_t(self.free, shape))
        low, high = ends_of(np.concatenate(drawn))
        return np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0)

    def to_json(self) -> dict[str, Any]:
        """Return the law as it is written to a file."""
        low, high = ends_of(self.samples)
        return {
            "task": self.task,
            "source": self.source,
            "task_loss": self.first.to_json(),
            "sigmoid": {
                name: {"value": float(v), "interval_95": [float(a), float(b)]}
                for name, v, a, b in zip(NAMES, self.values, low, high, strict=True)
            },
            "spread": self.spread,
        }


def sigmoid(values: Array, loss: Array) -> Array:
    """Return the accuracy (n,) for task losses (n,)."""
    low, high, slope, middle = values
    at = np.clip(slope * (loss - middle), -500, 500)
    result: Array = low + (high - low) / (1 + np.exp(at))
    return result


def fit_sigmoid(
    loss: Array, accuracy: Array, chance: float | None = None, begin: Array | None = None
) -> Array:
    """Return low, high, slope and middle; ``chance`` fixes the accuracy of guessing.

    The search begins at ``begin``, or at several places.
    """
    least = float(accuracy.min())
    lowest = (max(chance - 1e-6, 0.0), chance + 1e-6) if chance is not None else (0.0, least + 0.05)
    width = max(float(np.ptp(loss)), 1e-3)
    bounds = (
        [lowest[0], max(float(accuracy.max()), lowest[1]) + 1e-6, 0.1 / width, 0.0],
        [lowest[1], 1.0 + 2e-6, 100.0 / width, float(loss.max()) + width],
    )

    def residuals(values: Array) -> Array:
        apart = (sigmoid(values, loss) - accuracy) / SOFT
        return np.append(apart, (values[1] - CEILING[0]) / CEILING[1])

    starts = [] if begin is None else [begin]
    if not starts:
        middles = [float(np.quantile(loss, q)) for q in (0.1, 0.5)]
        starts = [
            np.array([sum(lowest) / 2, 1.0, slope / width, middle])
            for slope in (2.0, 8.0)
            for middle in middles
        ]
    found = []
    for start in starts:
        begun = np.clip(start, np.array(bounds[0]) + 1e-9, np.array(bounds[1]) - 1e-9)
        found.append(
            least_squares(
                residuals, begun, bounds=bounds, loss="soft_l1", x_scale="jac", max_nfev=100
            )
        )
    return np.asarray(min(found, key=lambda result: result.cost).x)


def fit_downstream(
    task: str,
    points: Points,
    accuracy: Array,
    chance: float | None = None,
    samples: int = 200,
    seed: int = 0,
) -> Downstream:
    """Fit both steps, with bootstrap samples; ``points.loss`` is the task's loss.

    Raises UserError for accuracies that are not shares, or fewer than 6 runs.
    """
    accuracy = np.asarray(accuracy, dtype=float)
    bad = np.flatnonzero(~((accuracy >= 0) & (accuracy <= 1)))
    if len(bad):
        raise UserError(
            f"{task}: the accuracy of {points.names[bad[0]]} is {accuracy[bad[0]]:g}, expected a "
            "share from 0 to 1"
        )
    if len(accuracy) < 6:
        raise UserError(f"{task}: there are {len(accuracy)} runs, expected at least 6")
    if samples < 2:
        raise UserError(f"--bootstrap is {samples}, expected at least 2 samples")
    first = fit(size_law("chinchilla", points), [points], Options("log"))
    bootstrap(first, [points], samples, seed)
    values = fit_sigmoid(points.loss, accuracy, chance)
    fitted = sigmoid(values, points.loss)
    residual = accuracy - fitted
    free = max(len(accuracy) - len(NAMES), 1)
    scale = math.sqrt(len(accuracy) / free)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        chosen = generator.choice(residual, len(residual)) * scale
        redrawn = np.clip(fitted + chosen, 0.0, 1.0)
        drawn.append(fit_sigmoid(points.loss, redrawn, chance, values))
    return Downstream(
        task,
        first,
        values,
        float(np.sqrt((residual**2).sum() / free)),
        np.stack(drawn),
        (float(points.loss.min()), float(points.loss.max())),
        free,
        seed,
    )
