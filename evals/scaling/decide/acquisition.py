"""Weigh what a run could tell: the expected fall of the verdict's entropy, per FLOP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr, ndtri, xlogy

from evals.scaling.decide.curve import Array
from evals.scaling.decide.inference import Posterior, covariance_of, noise_of, variance_after
from evals.scaling.decide.prior import FREE_EFFECT
from evals.scaling.decide.runs import Cell, Run

_TIE = 1e-10  # gains per share of the target's cost, below which the cheaper is taken
Pair = tuple[str, str]


@dataclass(frozen=True)
class Candidate:
    """Runs of one size and length that would be made together."""

    runs: tuple[Run, ...]

    @property
    def cell(self) -> Cell:
        """Return the size and length."""
        return self.runs[0].cell

    @property
    def arms(self) -> tuple[str, ...]:
        """Return the arms."""
        return tuple(run.arm for run in self.runs)

    @property
    def cost(self) -> float:
        """Return the cost of all of it."""
        return sum(run.cost for run in self.runs)


@dataclass(frozen=True)
class Scored:
    """A candidate with the entropy that it is expected to take away, in nats."""

    candidate: Candidate
    gain: float

    @property
    def rate(self) -> float:
        """Gain for the cost."""
        return self.gain / self.candidate.cost


def candidates_of(
    possible: Sequence[Run], done: Sequence[Run], left: Sequence[str], affordable: float
) -> list[Candidate]:
    """Return what could be run next within a cost: all arms left, or one that lags behind, by cell.

    Of an arm and a cell the next seed is meant, the lowest that has not been run.
    """
    following: dict[Cell, dict[str, Run]] = {}
    for run in sorted(possible, key=lambda r: r.seed):
        if run.arm in left:
            following.setdefault(run.cell, {}).setdefault(run.arm, run)
    seeds: dict[Cell, dict[str, int]] = {}
    for run in done:
        of_cell = seeds.setdefault(run.cell, dict.fromkeys(left, 0))
        if run.arm in of_cell:
            of_cell[run.arm] += 1
    found = []
    for cell, by_arm in sorted(following.items()):
        made = seeds.get(cell, dict.fromkeys(left, 0))
        most = max(made[arm] for arm in left)
        if len(by_arm) > 1:
            found.append(Candidate(tuple(by_arm[arm] for arm in left if arm in by_arm)))
        found += [Candidate((run,)) for arm, run in by_arm.items() if made[arm] < most and most > 0]
    return [candidate for candidate in found if candidate.cost <= affordable]


def score(
    posterior: Posterior,
    candidates: Sequence[Candidate],
    pairs: Sequence[Pair],
    lone: Mapping[Cell, Sequence[str]],
) -> list[Scored]:
    """Return each candidate with its gain, summed over the pairs to be told apart.

    ``lone``: arms that alone have run a cell; a second arm there makes their runs count too.
    """
    index = {arm: i for i, arm in enumerate(posterior.observations.arms)}
    first = np.array([index[a] for a, _ in pairs])
    second = np.array([index[b] for _, b in pairs])
    c = posterior.covariance
    mean = posterior.mean[:, first] - posterior.mean[:, second]
    variance = c[:, first, first] + c[:, second, second] - 2 * c[:, first, second]
    variance = np.maximum(variance, 1e-12)
    before = _entropy(ndtr(mean / np.sqrt(variance)))
    found = []
    for candidate in candidates:
        arms = [index[a] for a in dict.fromkeys([*candidate.arms, *lone.get(candidate.cell, ())])]
        g = resolved(posterior, arms, candidate.cell)
        r = g[:, first, first] + g[:, second, second] - 2 * g[:, first, second]
        r = np.clip(r, 0.0, variance * (1 - 1e-6))
        after = _expected_entropy(mean, variance, r)
        found.append(Scored(candidate, float(posterior.weights @ (before - after).sum(1))))
    return found


def best_of(scored: Sequence[Scored], unit: float) -> Scored:
    """Return the candidate with the largest gain for its cost; the cheaper of equal ones."""
    top = max(s.rate for s in scored) * unit
    close = [s for s in scored if s.rate * unit >= top - _TIE]
    return min(close, key=lambda s: (s.candidate.cost, s.candidate.cell, s.candidate.arms))


def _entropy(p: Array) -> Array:
    found: Array = -xlogy(p, p) - xlogy(1 - p, 1 - p)
    return found


def _expected_entropy(mean: Array, variance: Array, r: Array) -> Array:
    nodes, weights = np.polynomial.hermite_e.hermegauss(7)
    weights = weights / weights.sum()
    later = mean[..., None] + np.sqrt(r)[..., None] * nodes
    found: Array = _entropy(ndtr(later / np.sqrt(variance - r)[..., None])) @ weights
    return found


def resolved(posterior: Posterior, arms: Sequence[int], cell: Cell) -> Array:
    """Return by how much the covariance of the levels at the target falls with runs of a cell."""
    seen, draws, blocks = posterior.observations, posterior.draws, posterior.blocks
    places = seen.positions()[list(arms)]
    here = np.array([seen.position(seen.arms[a], cell) for a in arms])[:, None]
    precision = blocks.precision[:, list(arms)]
    level = draws.sizes[:, 0] ** 2
    cross = covariance_of(draws, np.array(arms), here, places)[:, :, 0] * (seen.count[arms] > 0)
    own = covariance_of(draws, np.array(arms), here, here)[:, :, 0, 0]
    by_value = np.einsum("sai,saij->saj", cross, precision)
    to_effects = -by_value
    shared = FREE_EFFECT**2
    if cell in seen.cells:
        to_effects[..., seen.cells.index(cell)] += 1
        shared = 0.0
    spread = np.einsum("sai,sij->saj", to_effects, blocks.effects_covariance)
    together = np.einsum("saj,sbj->sab", spread, to_effects) + shared
    index = np.arange(len(arms))
    together[:, index, index] += own - (by_value * cross).sum(-1) + noise_of(draws)[:, arms]
    gain = level[:, None, None] * blocks.precision.sum(2)
    toward = -np.einsum("scj,saj->sca", gain, spread)
    toward[:, list(arms), index] += level[:, None] - (gain[:, list(arms)] * cross).sum(-1)
    solved = np.linalg.solve(together, np.swapaxes(toward, 1, 2))
    found: Array = toward @ solved
    return found


def chance_of_verdict(
    posterior: Posterior,
    possible: Sequence[Run],
    pairs: Sequence[Pair],
    confidence: float,
    margin: float,
) -> dict[Pair, float]:
    """Return, by pair, the chance of a verdict if all these runs were made."""
    after = variance_after(posterior, possible)
    index = {arm: i for i, arm in enumerate(posterior.observations.arms)}
    edge, bound = np.log1p(margin), float(ndtri(confidence))
    found = {}
    for a, b in pairs:
        i, j = index[a], index[b]
        mean, variance = posterior.difference(a, b)
        later = after[:, i, i] + after[:, j, j] - 2 * after[:, i, j]
        later = np.clip(later, 1e-12, variance)
        move = np.sqrt(np.maximum(variance - later, 1e-12))
        need = bound * np.sqrt(later)
        decided = ndtr((mean - need) / move) + ndtr((-mean - need) / move)
        room = np.maximum(edge - need, 0.0)
        alike = ndtr((room - mean) / move) - ndtr((-room - mean) / move)
        found[a, b] = float(posterior.weights @ np.minimum(decided + alike, 1.0))
    return found


def without(runs: Sequence[Run], done: Sequence[Run]) -> list[Run]:
    """Return the runs that have not been made, by arm, cell and seed."""
    made = {(run.arm, run.cell, run.seed) for run in done}
    return [replace(run) for run in runs if (run.arm, run.cell, run.seed) not in made]
