"""Tell what the data determine: standard errors to first order, parameters without a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.scaling.parameters import Array
from pretrain.common.screen import readable

if TYPE_CHECKING:
    from evals.scaling.fitting import Fit, Problem

_SINGULAR = 1e-11  # share of the largest eigenvalue
_SAME = 1.01  # objectives within 1 % count as equal


def jacobian(fit_: Fit, prepared: Sequence[Any]) -> Array:
    """Return the derivatives (n, parameters) of the log loss by theta and beta, concatenated."""
    rows = []
    for item in prepared:
        columns, derivatives = fit_.law.design(fit_.theta, item)
        predicted = columns @ fit_.beta
        by_theta = np.einsum("pnk,k->np", derivatives, fit_.beta)
        rows.append(np.concatenate([by_theta, columns], axis=1) / predicted[:, None])
    return np.concatenate(rows)


def correlation_length(residuals: Sequence[Array]) -> float:
    """Return the integrated autocorrelation of the residuals along the curves, at least 1 point."""
    total, power = 1.0, sum(float(r @ r) for r in residuals)
    if power == 0:
        return 1.0
    for lag in range(1, max(len(r) for r in residuals) // 2):
        shared = sum(float(r[lag:] @ r[:-lag]) for r in residuals if len(r) > lag) / power
        if shared < 0.05:
            break
        total += 2 * shared
    return total


def covariance(
    fit_: Fit, prepared: Sequence[Any], *, priors: bool = True, least: float = 0.0
) -> Array:
    """Return the covariance of theta and beta, to first order.

    Correlated residuals count as fewer points; ``least`` is the least relative error of one point.
    """
    matrix = jacobian(fit_, prepared)
    residual = np.concatenate(fit_.residuals)
    # Robust, like the fit: from the median of the residuals.
    spread = max(1.4826 * float(np.median(np.abs(residual))), 1e-9, least)
    information = matrix.T @ matrix / (spread**2 * correlation_length(fit_.residuals))
    if priors and fit_.options.priors:
        for i, parameter in enumerate(fit_.law.nonlinear):
            if parameter.prior:
                information[i, i] += parameter.prior[1] ** -2
    scale = np.sqrt(np.maximum(np.diag(information), 1e-300))
    values, vectors = np.linalg.eigh(information / np.outer(scale, scale))
    # Directions without information have a large variance, not none.
    vectors = vectors / np.maximum(scale, 1e-100)[:, None]
    result: Array = (vectors / np.maximum(values, 1e-12)) @ vectors.T
    return result


def _collinear(found: Fit, problem: Problem) -> dict[str, str]:
    """Return the linear parameters whose terms the data cannot tell apart, each with a reason."""
    columns = problem.designs(found.theta)[0] / problem.loss[:, None]
    norms = np.sqrt((columns**2).sum(axis=0))
    there = np.flatnonzero(norms > 0)
    scaled = columns[:, there] / norms[there]
    values, vectors = np.linalg.eigh(scaled.T @ scaled)
    none = vectors[:, values <= _SINGULAR * values[-1]]
    mixed = [found.law.linear[there[i]].name for i in np.flatnonzero((np.abs(none) > 0.1).any(1))]
    return {
        name: f"the data cannot tell its term from {' and '.join(n for n in mixed if n != name)}'s"
        for name in mixed
    }


def undetermined(found: Fit, problem: Problem) -> dict[str, str]:
    """Return the parameters that the data do not determine, each with a reason.

    Fills ``found.standard_errors``, which priors make smaller.

    Residuals count as at least as large as the Huber width: no law is more accurate than that, and
    a single smooth curve is often fitted better, by many values.
    """
    law = found.law
    reasons = law.doubts(found.values, problem.prepared)
    reasons |= _collinear(found, problem)
    errors, known = (
        np.sqrt(np.diag(covariance(found, problem.prepared, priors=p, least=found.options.huber)))
        for p in (False, True)
    )
    found.standard_errors = {p.name: float(e) for p, e in zip(law.parameters, known, strict=True)}
    bounds = law.bounds()
    equal = [s.found for s in found.starts if s.objective <= found.objective * _SAME]
    for i, parameter in enumerate(law.parameters):
        if parameter.name in reasons:
            continue
        value = found.values[parameter.name]
        error = float(errors[i])
        if i < len(found.theta):
            low, high = bounds[i]
            width = (found.theta[i] - low, high - found.theta[i])
            if min(width) < 1e-6 * max(high - low, 1):
                reasons[parameter.name] = f"at its bound of {readable(value, 4)}"
                continue
            if parameter.prior and found.options.priors and error > parameter.prior[1]:
                reasons[parameter.name] = "the data say less about it than its prior"
                continue
            others = [other[parameter.name] for other in equal]
            if others and max(others) - min(others) > 0.5 * abs(value):
                reasons[parameter.name] = (
                    f"different starts end at {readable(min(others), 4)} to "
                    f"{readable(max(others), 4)}, which fit "
                    "equally well"
                )
                continue
        size = 1.0 if parameter.log else max(abs(value), 1e-12)
        if value == 0:
            reasons[parameter.name] = "at its bound of 0"
        elif error > 0.5 * size and known[i] <= 0.5 * size:
            reasons[parameter.name] = "it follows from the prior of another one"
        elif error > 0.5 * size:
            reasons[parameter.name] = (
                f"standard error {readable(error)}"
                if not parameter.log
                else f"known only to a factor of {math.exp(min(error, 99)):.3g}"
            )
    return reasons
