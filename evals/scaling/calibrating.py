"""How large the error of a law is, from what it predicts when data are held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.scaling.curves import Curve, Points
from evals.scaling.determined import jacobian
from evals.scaling.fitting import CORRELATED, HUBER, Fit
from evals.scaling.model_error import ModelError, smooth_function, training_state
from evals.scaling.parameters import Array

DRAWS = 100  # simulated errors per held-out set
# Before held-out errors are seen, a law's error is about the Huber width, as if four had shown it.
PRIOR_ERRORS = 4.0
FIRST_PART = 2 / 3  # of each curve, from which its last part is predicted
# A held-out loss whose standard error is beyond this is not determined by the other runs.
UNDETERMINED = 0.05

# Which losses (n,) to fit, and the indices of those to predict.
HeldOutSet = tuple[NDArray[np.bool_], list[int]]


def calibrated(
    found: Fit, data: Sequence[Any], prepared: Sequence[Any], samples: int, seed: int
) -> ModelError:
    """Return the law's error with scales drawn from their posterior, given held-out errors.

    Refits to held-in losses are to first order around the fit.
    """
    curves = isinstance(data[0], Curve)
    reference = max(c.peak for c in data) if curves else 1.0
    residuals = [
        np.log(item.loss / found.law.loss(found.theta, found.beta, item)) for item in prepared
    ]
    noise = noise_of(found, residuals, curves)
    errors = held_out_errors(found, data, prepared, residuals, noise, reference, seed)
    grid = np.geomspace(1e-5 if not curves else 1e-4, 0.05, 120)
    log_density = -PRIOR_ERRORS * (np.log(grid) + (HUBER / grid) ** 2 / 2)
    for error, of_law, of_noise, weight in errors:
        variance = grid**2 * of_law + of_noise
        log_density -= weight * (np.log(variance) + error**2 / variance) / 2
    density = np.exp(log_density - log_density.max())
    generator = np.random.default_rng((seed, 2))
    scales = generator.choice(grid, size=samples, p=density / density.sum())
    return ModelError(scales, seed, reference, noise, len(errors))


def noise_of(found: Fit, residuals: Sequence[Array], curves: bool) -> float:
    """Return the standard deviation of one log loss around its run, or around the law."""
    if curves:
        # Second differences do not see what varies smoothly along a curve.
        bends = [np.diff(r, 2) / np.sqrt(6) for r in residuals if len(r) > 2]
        if bends:
            return float(1.4826 * np.median(np.abs(np.concatenate(bends))))
    every = np.concatenate(residuals)
    freedom = max(len(every) - len(found.law.parameters), 1)
    return float(np.sqrt(every @ every / freedom))


def held_out_errors(
    found: Fit,
    data: Sequence[Any],
    prepared: Sequence[Any],
    residuals: Sequence[Array],
    noise: float,
    reference: float,
    seed: int,
) -> list[tuple[float, float, float, float]]:
    """Return (error, its variance for a law's error of 1, that of the rest, weight) for each.

    What is held out is each schedule, each size, and the last part of all curves. An error that
    the other losses do not determine at all is left out.
    """
    matrix, every = jacobian(found, prepared), np.concatenate(residuals)
    owner = np.repeat(np.arange(len(data)), [len(r) for r in residuals])
    robust = found.weights / np.maximum(1.0, np.abs(every) / found.options.huber)
    state = np.concatenate([training_state(item, reference) for item in data])
    smooth = np.stack([smooth_function(state, (seed + 1, i)) for i in range(DRAWS)], axis=1)
    generator = np.random.default_rng((seed, 3))
    white = noise * generator.standard_normal(smooth.shape)
    deviations = np.zeros(matrix.shape[1])
    for i, parameter in enumerate(found.law.nonlinear):
        if parameter.prior and found.options.priors:
            deviations[i] = parameter.prior[1]
    precision = np.where(deviations > 0, np.maximum(deviations, 1e-12) ** -2.0, 0.0)
    shifts = deviations[:, None] * generator.standard_normal((len(deviations), DRAWS))
    result = []
    for keep, tests in held_out_sets(data, owner):
        # The fit weighs its losses against the priors like this, see Problem.
        unit = min(CORRELATED, int(keep.sum())) * found.options.huber**2
        strength = unit * precision
        weighted = matrix[keep] * robust[keep, None]
        information = weighted.T @ matrix[keep] + np.diag(strength)
        scale = np.sqrt(np.maximum(np.diag(information), 1e-300))
        inverse = np.linalg.pinv(information / np.outer(scale, scale), 1e-12, hermitian=True)
        inverse = inverse / np.outer(scale, scale)
        for at in tests:
            row = matrix[at]
            if np.sqrt(unit * row @ inverse @ row) > UNDETERMINED or _blind(
                information, scale, row
            ):
                continue
            gain = row @ inverse
            error = every[at] - gain @ (weighted.T @ every[keep])
            of_law = smooth[at] - gain @ (weighted.T @ smooth[keep])
            rest = white[at] - gain @ (weighted.T @ white[keep] + strength[:, None] * shifts)
            result.append(
                (float(error), float(of_law.var()), float(rest.var()) + 1e-12, 1 / len(tests))
            )
    return result


def _blind(information: Array, scale: Array, row: Array) -> bool:
    """Return whether the row points along a direction of which there is no information."""
    values, vectors = np.linalg.eigh(information / np.outer(scale, scale))
    along = vectors.T @ (row / scale)
    none = values < 1e-10 * values.max()
    return bool((np.abs(along[none]) > 1e-3 * np.abs(along).max()).any())


def held_out_sets(data: Sequence[Any], owner: NDArray[np.int64]) -> list[HeldOutSet]:
    """Return (losses to fit (n,), indices to predict) for each set that is held out."""
    sets: list[HeldOutSet] = []
    if isinstance(data[0], Points):
        points = data[0]
        sizes = np.unique(points.parameters)
        if len(sizes) >= 4:
            for size in sizes:
                out = points.parameters == size
                sets.append((~out, list(np.flatnonzero(out))))
        flops = np.asarray(points.flops)
        largest = flops > np.quantile(flops, FIRST_PART)
        sets.append((~largest, list(np.flatnonzero(largest))))
        return sets
    groups: dict[Any, list[int]] = {}
    for i, curve in enumerate(data):
        groups.setdefault((curve.parameters, curve.schedule_key), []).append(i)
    starts = np.concatenate([[0], np.cumsum([len(c.step) for c in data])])
    if len(groups) > 1:
        for members in groups.values():
            tests = []
            for i in members:
                middle = int(np.searchsorted(data[i].step, FIRST_PART * data[i].step[-1]))
                tests += [int(starts[i]) + middle, int(starts[i + 1]) - 1]
            sets.append((~np.isin(owner, members), tests))
    by_size = {c.parameters for c in data}
    if len(by_size) >= 4:
        for size in by_size:
            members = [i for i, c in enumerate(data) if c.parameters == size]
            sets.append((~np.isin(owner, members), [int(starts[i + 1]) - 1 for i in members]))
    early = np.concatenate([c.step <= FIRST_PART * c.step[-1] for c in data])
    sets.append((early, [int(s) - 1 for s in starts[1:]]))
    return sets
