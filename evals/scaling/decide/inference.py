"""The posterior of the arms' levels at the target: weighted draws, a Gaussian in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from evals.scaling.decide.curve import Array
from evals.scaling.decide.observations import Observations
from evals.scaling.decide.prior import (
    FREE_EFFECT,
    Prior,
    draws_for,
    kinds_of_arms,
    normals,
    uniforms,
)
from evals.scaling.decide.runs import Run

_DEFENSIVE = 0.2  # of each proposal is the prior, so that no weight runs away
_ADAPT_FROM = 30  # runs, from which the draws follow the data
_FEW = 32.0  # effective draws, below which they do so too


@dataclass
class Draws:
    """Sizes of effects (draws, 4), and factors on each arm's wander and noise (draws, arms)."""

    sizes: Array
    wander: Array
    noise: Array


@dataclass
class Blocks:
    """For every draw, what observations say: the arms' parts and the free effects of cells.

    ``precision``: (draws, arms, cells, cells), zero where nothing is run; ``effects``: the mean of
    the free effects (draws, cells) and ``effects_covariance``.
    """

    precision: Array
    effects: Array
    effects_covariance: Array
    likelihood: Array


@dataclass
class Posterior:
    """Hold what is believed after some runs; ``mean`` and ``covariance`` are of u at the target."""

    observations: Observations
    draws: Draws
    weights: Array
    mean: Array  # (draws, arms)
    covariance: Array  # (draws, arms, arms)
    blocks: Blocks

    @property
    def effective(self) -> float:
        """Return the effective number of draws."""
        return float(1 / (self.weights**2).sum())

    def difference(self, a: str, b: str) -> tuple[Array, Array]:
        """Return mean and variance of u_a - u_b in every draw."""
        i, j = self.observations.arms.index(a), self.observations.arms.index(b)
        c = self.covariance
        variance = c[:, i, i] + c[:, j, j] - 2 * c[:, i, j]
        return self.mean[:, i] - self.mean[:, j], np.maximum(variance, 1e-12)

    def better(self, a: str, b: str) -> float:
        """Return P(a better than b)."""
        mean, variance = self.difference(a, b)
        return float(self.weights @ ndtr(mean / np.sqrt(variance)))

    def alike(self, a: str, b: str, margin: float) -> float:
        """Return P(a and b differ by less than a share of compute)."""
        mean, variance = self.difference(a, b)
        sd, edge = np.sqrt(variance), np.log1p(margin)
        inside = ndtr((edge - mean) / sd) - ndtr((-edge - mean) / sd)
        return float(self.weights @ inside)

    def quantile(self, a: str, b: str, share: float) -> float:
        """Return a quantile of u_a - u_b."""
        mean, variance = self.difference(a, b)
        sd = np.sqrt(variance)
        low, high = float((mean - 9 * sd).min()), float((mean + 9 * sd).max())
        for _ in range(60):
            middle = (low + high) / 2
            if float(self.weights @ ndtr((middle - mean) / sd)) < share:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def best(self) -> dict[str, float]:
        """Return each arm's probability to be the best."""
        arms = self.observations.arms
        if len(arms) == 2:
            first = self.better(*arms)
            return {arms[0]: first, arms[1]: 1 - first}
        factor = np.linalg.cholesky(self.covariance + 1e-12 * np.eye(len(arms)))
        z = normals(len(arms), 3, 128)
        u = self.mean[:, None] + np.einsum("sij,nj->sni", factor, z)
        wins = (u.argmax(-1)[..., None] == np.arange(len(arms))).mean(1)
        return dict(zip(arms, (self.weights @ wins).tolist(), strict=True))

    def sizes(self) -> dict[str, float]:
        """Return the posterior medians, by weight, of level, slope, wander and noise."""
        found = {}
        for i, name in enumerate(("level", "slope", "wander", "noise")):
            order = np.argsort(self.draws.sizes[:, i])
            total = np.cumsum(self.weights[order])
            found[name] = float(self.draws.sizes[order, i][np.searchsorted(total, 0.5)])
        return found


def infer(observations: Observations, prior: Prior) -> Posterior:
    """Return the posterior: draws of the sizes of effects, weighted by marginal likelihood.

    Once there are many runs, or few draws carry the weight, the draws are proposed again twice from
    what the weights say, with a share from the prior.
    """
    center = np.log(prior.medians), np.diag(np.square(prior.spreads))
    draws, log_weights, blocks = _weighted(observations, prior, center, adapted=False, stream=0)
    for stream in (1, 2):
        weights = _normalized(log_weights)
        if observations.runs <= _ADAPT_FROM and 1 / (weights**2).sum() >= _FEW:
            break
        center = _moments(np.log(draws.sizes), log_weights, prior)
        draws, log_weights, blocks = _weighted(
            observations, prior, center, adapted=True, stream=stream
        )
    mean, covariance = _at_target(observations, draws, blocks)
    return Posterior(observations, draws, _normalized(log_weights), mean, covariance, blocks)


def _normalized(log_weights: Array) -> Array:
    weights = np.exp(log_weights - log_weights.max())
    found: Array = weights / weights.sum()
    return found


def _moments(logs: Array, log_weights: Array, prior: Prior) -> tuple[Array, Array]:
    """Return mean and covariance by the weights, tempered until enough draws carry them."""
    power = 1.0
    weights = _normalized(log_weights)
    while 1 / (weights**2).sum() < _FEW / 2 and power > 1e-3:
        power *= 0.7
        weights = _normalized(power * log_weights)
    mean = weights @ logs
    centred = logs - mean
    covariance = np.einsum("s,si,sj->ij", weights, centred, centred)
    return mean, 1.5 * covariance + 0.01 * np.diag(np.square(prior.spreads))


def _log_normal(logs: Array, center: tuple[Array, Array]) -> Array:
    mean, covariance = center
    factor = np.linalg.cholesky(covariance)
    z = np.linalg.solve(factor, (logs - mean).T)
    return -0.5 * np.square(z).sum(0) - np.log(np.diag(factor)).sum()


def _weighted(
    observations: Observations,
    prior: Prior,
    center: tuple[Array, Array],
    *,
    adapted: bool,
    stream: int,
) -> tuple[Draws, Array, Blocks]:
    """Draw sizes of effects and kinds of arms, and weight them by how they explain the runs."""
    broad = np.log(prior.medians), np.diag(np.square(prior.spreads))
    count = draws_for(len(observations.arms))
    z = normals(4, 10 + stream, count)
    logs = center[0] + z @ np.linalg.cholesky(center[1]).T
    log_weights = np.zeros(len(logs))
    if adapted:
        chosen = uniforms(1, 20 + stream, count)[:, 0] < _DEFENSIVE
        logs[chosen] = broad[0] + z[chosen] @ np.linalg.cholesky(broad[1]).T
        at_broad = _log_normal(logs, broad)
        mixture = np.logaddexp(
            np.log(_DEFENSIVE) + at_broad, np.log(1 - _DEFENSIVE) + _log_normal(logs, center)
        )
        log_weights = at_broad - mixture
    sizes = np.exp(logs)
    draws, log_ratio = _kinds(observations, prior, sizes, stream)
    blocks = _blocks(observations, draws)
    return draws, log_weights + log_ratio + blocks.likelihood, blocks


def _kinds(
    observations: Observations, prior: Prior, sizes: Array, stream: int
) -> tuple[Draws, Array]:
    """Draw whether each arm breaks its trend and how noisy it is, by what its own runs say.

    The cells' free effects are held at what arms of the usual kind make of them; the weight
    corrects for that.
    """
    wander, noise, chance = kinds_of_arms(prior.breaking)
    arms = len(observations.arms)
    usual = np.ones((len(sizes), arms))
    effects = _blocks(observations, Draws(sizes, usual, usual)).effects
    scores = np.stack(
        [
            _arm_likelihood(observations, Draws(sizes, usual * w, usual * v), effects)
            for w, v in zip(wander, noise, strict=True)
        ],
        axis=-1,
    )
    likely = chance * np.exp(scores - scores.max(-1, keepdims=True))
    likely /= likely.sum(-1, keepdims=True)
    proposal = (1 - _DEFENSIVE) * likely + _DEFENSIVE * chance
    uniform = uniforms(arms, 30 + stream, len(sizes))
    index = (uniform[..., None] > np.cumsum(proposal, -1)).sum(-1).clip(max=len(chance) - 1)
    taken = np.take_along_axis(proposal, index[..., None], -1)[..., 0]
    log_ratio = (np.log(chance[index]) - np.log(taken)).sum(-1)
    return Draws(sizes, wander[index], noise[index]), log_ratio


def covariance_of(
    draws: Draws, arm: NDArray[np.int64] | slice, first: Array, second: Array
) -> Array:
    """Return the prior covariance of an arm's level between positions (..., n, 2) and (..., m, 2).

    The wander is pinned to nothing at the target, and grows away from it.
    """
    level, slope, wander = (draws.sizes[:, i, None, None, None] for i in range(3))
    a, b = first[..., :, None, :], second[..., None, :, :]
    trend = (a * b).sum(-1)
    shared = np.where(a * b > 0, np.minimum(np.abs(a), np.abs(b)), 0.0).sum(-1)
    factor = wander * draws.wander[:, arm, None, None]
    found: Array = level**2 + slope**2 * trend + factor**2 * shared
    return found


def noise_of(draws: Draws) -> Array:
    """Return the variance of one run, by draw and arm."""
    found: Array = (draws.sizes[:, 3:4] * draws.noise) ** 2
    return found


def _precision(observations: Observations, draws: Draws) -> tuple[Array, Array]:
    """Return the inverse covariances of the arms' observations, and their log determinants."""
    seen = observations.count > 0
    places = observations.positions()
    both = seen[:, :, None] & seen[:, None, :]
    matrix = np.where(both, covariance_of(draws, slice(None), places, places), 0.0)
    single = noise_of(draws)[..., None] / np.maximum(observations.count, 1)
    index = np.arange(seen.shape[1])
    matrix[..., index, index] += np.where(seen, single, 1.0)
    _, log_determinant = np.linalg.slogdet(matrix)
    inverse = np.where(both, np.linalg.inv(matrix), 0.0)
    return inverse, log_determinant


def _seed_likelihood(observations: Observations, draws: Draws) -> Array:
    """Return the log likelihood of the seeds' deviations from their means (draws, arms)."""
    variance = noise_of(draws)
    spare = np.maximum(observations.count - 1, 0).sum(-1)
    found: Array = -0.5 * spare * np.log(variance) - observations.squares.sum(-1) / (2 * variance)
    return found


def _arm_likelihood(observations: Observations, draws: Draws, effects: Array) -> Array:
    """Return each arm's log likelihood given the cells' free effects (draws, arms)."""
    precision, log_determinant = _precision(observations, draws)
    rest = observations.u - effects[:, None]
    fit = np.einsum("sai,saij,saj->sa", rest, precision, rest)
    found: Array = -0.5 * (log_determinant + fit) + _seed_likelihood(observations, draws)
    return found


def _blocks(observations: Observations, draws: Draws) -> Blocks:
    """Return the parts of the posterior and the marginal log likelihood of every draw."""
    precision, log_determinant = _precision(observations, draws)
    cells = len(observations.cells)
    information = precision.sum(1) + np.eye(cells) / FREE_EFFECT**2
    weighted = np.einsum("saij,aj->sai", precision, observations.u)
    total = weighted.sum(1)
    covariance = np.linalg.inv(information)
    effects = np.einsum("sij,sj->si", covariance, total)
    _, log_information = np.linalg.slogdet(information)
    likelihood = (
        -0.5 * log_determinant.sum(-1)
        - 0.5 * np.einsum("ai,sai->s", observations.u, weighted)
        - 0.5 * (log_information + cells * np.log(FREE_EFFECT**2))
        + 0.5 * (total * effects).sum(-1)
        + _seed_likelihood(observations, draws).sum(-1)
    )
    return Blocks(precision, effects, covariance, likelihood)


def _at_target(observations: Observations, draws: Draws, blocks: Blocks) -> tuple[Array, Array]:
    """Return mean and covariance of the arms' levels at the target, by draw."""
    level = draws.sizes[:, 0] ** 2
    gain = level[:, None, None] * blocks.precision.sum(2)  # the target's covariance is the level's
    rest = observations.u - blocks.effects[:, None]
    mean = np.einsum("sai,sai->sa", gain, rest)
    covariance = np.einsum("sai,sij,sbj->sab", gain, blocks.effects_covariance, gain)
    index = np.arange(len(observations.arms))
    covariance[:, index, index] += level[:, None] * (1 - gain.sum(-1))
    return mean, covariance


def variance_after(posterior: Posterior, runs: Sequence[Run]) -> Array:
    """Return the covariance of the levels at the target if further runs were made, by draw."""
    seen = posterior.observations
    index = {arm: i for i, arm in enumerate(seen.arms)}
    cells = [*seen.cells, *sorted({run.cell for run in runs} - set(seen.cells))]
    extra = len(cells) - len(seen.cells)
    count = np.pad(seen.count, ((0, 0), (0, extra)))
    for run in runs:
        count[index[run.arm], cells.index(run.cell)] += 1
    nothing = np.zeros_like(count)
    then = replace(seen, cells=cells, count=count, u=nothing, squares=nothing)
    return _at_target(then, posterior.draws, _blocks(then, posterior.draws))[1]
