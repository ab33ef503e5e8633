"""The error of a law itself: smooth functions of the training state, as large as held-out errors.

A law is wrong by more than the noise of its data, and in the same direction along a whole stretch
of a run. Its error is taken to be a smooth random function of the state of training, drawn anew for
each bootstrap sample: of the progress, of the learning rate, and of how far it has fallen of late;
of size and tokens in tables of runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.scaling.curves import Curve, Points
from evals.scaling.parameters import Array

WAVES = 64  # cosines that make up one smooth random function
# The error changes over an e-fold of training, a third of the peak rate, and a decade of size.
PROGRESS, FALL, DECADE = 1.0, 0.3, 2.3


@dataclass
class ModelError:
    """The error of a law, as drawn for each bootstrap sample.

    scales: (samples,) standard deviation of log loss; seed: of the functions; reference: learning
    rate that counts as 1; noise: standard deviation of a logged loss around its run; held_out:
    the number of errors that the scales follow from.
    """

    scales: Array
    seed: int
    reference: float
    noise: float
    held_out: int

    def draw(self, data: Any) -> Array:
        """Return the error of log loss (samples, n) at a curve's logged steps, or of points."""
        state = training_state(data, self.reference)
        rows = [smooth_function(state, (self.seed, i)) for i in range(len(self.scales))]
        return self.scales[:, None] * np.stack(rows)

    def to_json(self) -> dict[str, Any]:
        """Return the fields for a file."""
        return {**vars(self), "scales": self.scales.tolist()}


def model_error_from_json(saved: dict[str, Any] | None) -> ModelError | None:
    """Return what :meth:`ModelError.to_json` wrote, or None where there was none."""
    if saved is None:
        return None
    return ModelError(**{**saved, "scales": np.array(saved["scales"], dtype=float)})


def training_state(data: Any, reference: float) -> Array:
    """Return what a law's error depends on smoothly (n, coordinates), each in its own unit."""
    if isinstance(data, Points):
        return np.stack([np.log(data.parameters), np.log(data.tokens)], axis=1) / DECADE
    assert isinstance(data, Curve)
    last = int(data.step[-1])
    x = np.append(data.lr, data.lr[-1])[: last + 1] / reference
    at = np.minimum(data.step, last)
    progress = np.log(np.maximum(np.cumsum(x)[at], 1e-9)) / PROGRESS
    # Steps count by their square, so that the last fifth of a run has half of the weight.
    weights = np.arange(1, last + 2, dtype=float) ** 2
    weights[: data.warmup] = 0.0
    fallen = (np.cumsum(weights * (1 - x)) / np.maximum(np.cumsum(weights), 1e-9))[at]
    size = np.full(len(at), np.log(data.parameters or 1.0) / DECADE)
    return np.stack([progress, (1 - x[at]) / FALL, fallen / FALL, size], axis=1)


def smooth_function(state: Array, seed: tuple[int, int]) -> Array:
    """Return a random function (n,) of variance 1, correlated over one unit of the state."""
    generator = np.random.default_rng((*seed, 1))
    waves = generator.standard_normal((state.shape[1], WAVES))
    phases = generator.uniform(0, 2 * np.pi, WAVES)
    function: Array = np.sqrt(2 / WAVES) * np.cos(state @ waves + phases).sum(axis=1)
    return function
