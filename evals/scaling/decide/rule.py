"""The rule of a decision: what may be said, when it stops, and which run is next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from evals.scaling.decide.accidents import diverged
from evals.scaling.decide.acquisition import (
    Candidate,
    Pair,
    Scored,
    best_of,
    candidates_of,
    chance_of_verdict,
    score,
    without,
)
from evals.scaling.decide.inference import Posterior, infer
from evals.scaling.decide.observations import observe
from evals.scaling.decide.prior import Prior
from evals.scaling.decide.runs import Cell, Run, Target, long_enough

_UNSTABLE = 2  # diverged runs of one arm, from which nothing is decided about it
_ROUNDING = 1 + 1e-9

Kind = Literal["better", "alike"]


@dataclass(frozen=True)
class Rule:
    """When something is said, and what is spent."""

    confidence: float = 0.95
    margin: float = 0.05  # share of compute, below which a difference does not matter
    budget: float = 0.3  # of what the arms' target runs cost
    reach: float = 1 / 12  # of the target's compute: the least largest run of both arms
    span: float = 8.0  # of sizes (of lengths where there is one size) of both arms
    smallest: float = 1 / 2500  # of the target's compute: the least that is run
    tokens_per_parameter: float = 0.5  # of the target's: the least that is used
    futile: float = 0.05  # chance of any verdict, under which nothing more is run
    out: float = 0.02  # P(best), under which an arm is left out of later rounds


@dataclass(frozen=True)
class Verdict:
    """``better``: the first of the pair is; ``alike``: no difference that matters."""

    kind: Kind
    pair: Pair
    probability: float
    spent: float  # by the arms of the pair
    low: float = 0.0  # 95 % of u, and its median
    middle: float = 0.0
    high: float = 0.0


@dataclass
class Step:
    """What is believed after the runs so far, and what comes next.

    ``taken`` is None at the end, and ``reason`` then one of verdict, budget, futile, all made,
    unstable.
    """

    posterior: Posterior | None
    verdicts: list[Verdict]
    left: list[str]
    spent: float
    taken: Candidate | None
    reason: str
    scored: list[Scored] = field(default_factory=list)
    unstable: list[str] = field(default_factory=list)


class Campaign:
    """A decision between arms: the best of them, or the order of every pair of them.

    It holds no state but the verdicts about pairs, which stand once they are made.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        prior: Prior,
        rule: Rule | None = None,
        *,
        goal: Literal["best", "pairs"] = "best",
        pairs: Sequence[Pair] | None = None,
        nats: bool = False,
    ) -> None:
        """``pairs``: those to tell apart, by default all; ``nats``: the metric is a loss."""
        self.targets, self.prior, self.rule = dict(targets), prior, rule or Rule()
        self.goal, self.nats = goal, nats
        self.pairs = list(pairs or combinations(targets, 2))
        self.verdicts: dict[Pair, Verdict] = {}
        self.budget = self.rule.budget * sum(target.cost for target in targets.values())

    def step(self, done: Sequence[Run], possible: Sequence[Run]) -> Step:
        """Refit, say what can be said, and choose the next runs of the possible ones."""
        spent = sum(run.cost for run in done)
        every = [*done, *possible]
        broken = diverged(done, nats=self.nats)
        sound = [run for run in done if run not in broken]
        # Two lengths of one run, which may have diverged before they parted, are one.
        apart = {(run.arm, run.parameters, run.seed) for run in broken}
        unstable = [a for a in self.targets if sum(arm == a for arm, *_ in apart) >= _UNSTABLE]
        failed = {(run.arm, run.cell) for run in broken}
        arms = [arm for arm in self.targets if arm not in unstable]
        open_ = [
            run
            for run in without(self._usable(possible, every), done)
            if run.arm in arms and (run.arm, run.cell) not in failed
        ]
        usable = self._usable(sound, every)
        if len(arms) < 2:
            return Step(None, [], arms, spent, None, "unstable", unstable=unstable)
        first = self._first(usable, open_, arms, failed)
        if first is not None:
            fits = spent + first.cost <= self.budget * _ROUNDING
            return Step(
                None,
                [],
                arms,
                spent,
                first if fits else None,
                "first" if fits else "budget",
                unstable=unstable,
            )
        seen = observe(
            [run for run in usable if run.arm in arms], {arm: self.targets[arm] for arm in arms}
        )
        if not seen.cells:
            return Step(None, [], arms, spent, None, "budget", unstable=unstable)
        posterior = infer(seen, self.prior)
        left, focus = self._judge(posterior, usable, arms)
        verdicts = list(self.verdicts.values())
        if not focus:
            return Step(posterior, verdicts, left, spent, None, "verdict", unstable=unstable)
        return self._next(posterior, usable, open_, left, focus, spent, unstable)

    def _usable(self, runs: Sequence[Run], ladder: Sequence[Run]) -> list[Run]:
        """Return the runs that are large and long enough, of a ladder."""
        rule, found = self.rule, []
        for arm, target in self.targets.items():
            own = long_enough(
                (run for run in runs if run.arm == arm),
                target,
                rule.tokens_per_parameter,
                one_size=len({run.parameters for run in ladder if run.arm == arm}) == 1,
            )
            found += [
                run for run in own if rule.smallest * target.compute <= run.compute * _ROUNDING
            ]
        return found

    def _first(
        self,
        done: Sequence[Run],
        possible: Sequence[Run],
        arms: Sequence[str],
        failed: set[tuple[str, Cell]],
    ) -> Candidate | None:
        """Return what is missing of the first two sizes, one seed of every arm."""
        wanted: list[Run] = []
        for arm in arms:
            own = sorted(
                (
                    run
                    for run in [*done, *possible]
                    if run.arm == arm and (arm, run.cell) not in failed
                ),
                key=lambda run: (run.compute, run.seed),
            )
            one_size = len({run.parameters for run in own}) == 1
            sizes: dict[float, Run] = {}
            for run in own:
                sizes.setdefault(run.tokens if one_size else run.parameters, run)
            wanted += list(sizes.values())[:2]
        have = {(run.arm, run.cell) for run in done}
        missing = [run for run in wanted if (run.arm, run.cell) not in have]
        if not missing:
            return None
        cell = min((run.compute, run.cell) for run in missing)[1]
        return Candidate(tuple(run for run in missing if run.cell == cell))

    def _judge(
        self, posterior: Posterior, runs: Sequence[Run], arms: Sequence[str]
    ) -> tuple[list[str], list[Pair]]:
        """Note verdicts; return the arms left and the pairs still to be told apart."""
        rule = self.rule
        if self.goal == "pairs":
            for a, b in self.pairs:
                known = a in arms and b in arms and (a, b) not in self.verdicts
                if known and self.far_enough((a, b), runs):
                    self._judge_pair(posterior, (a, b), runs)
            focus = [
                pair for pair in self.pairs if pair not in self.verdicts and set(pair) <= set(arms)
            ]
            return [arm for arm in arms if any(arm in pair for pair in focus)], focus
        chances = posterior.best()
        leader = max(arms, key=lambda arm: chances[arm])
        left = [arm for arm in arms if arm == leader or chances[arm] >= rule.out]
        if len(left) == 1:  # the second is kept, to be told from
            left.append(max((a for a in arms if a != leader), key=lambda arm: chances[arm]))
        rivals = [(leader, arm) for arm in left if arm != leader]
        if all(self.far_enough(pair, runs) for pair in rivals):
            runner_up = max(rivals, key=lambda pair: chances[pair[1]])
            if chances[leader] >= rule.confidence:
                self._note(posterior, "better", runner_up, chances[leader], runs)
            elif all(posterior.alike(*pair, rule.margin) >= rule.confidence for pair in rivals):
                chance = min(posterior.alike(*pair, rule.margin) for pair in rivals)
                self._note(posterior, "alike", runner_up, chance, runs)
        return left, [] if self.verdicts else rivals

    def far_enough(self, pair: Pair, runs: Sequence[Run]) -> bool:
        """Return whether both arms' runs come near enough to the target, and span enough sizes."""
        for arm in pair:
            own, target = [run for run in runs if run.arm == arm], self.targets[arm]
            if not own:
                return False
            if max(run.compute for run in own) * _ROUNDING < self.rule.reach * target.compute:
                return False
            sizes = [run.parameters for run in own]
            if max(sizes) == min(sizes):
                sizes = [run.tokens for run in own]
            if max(sizes) * _ROUNDING < self.rule.span * min(sizes):
                return False
        return True

    def _judge_pair(self, posterior: Posterior, pair: Pair, runs: Sequence[Run]) -> None:
        chance = posterior.better(*pair)
        if max(chance, 1 - chance) >= self.rule.confidence:
            order = pair if chance > 0.5 else (pair[1], pair[0])
            self._note(posterior, "better", order, max(chance, 1 - chance), runs, pair)
        else:
            chance = posterior.alike(*pair, self.rule.margin)
            if chance >= self.rule.confidence:
                self._note(posterior, "alike", pair, chance, runs, pair)

    def _note(
        self,
        posterior: Posterior,
        kind: Kind,
        order: Pair,
        chance: float,
        runs: Sequence[Run],
        key: Pair | None = None,
    ) -> None:
        spent = sum(run.cost for run in runs if run.arm in order)
        low, middle, high = (posterior.quantile(*order, share) for share in (0.025, 0.5, 0.975))
        self.verdicts[key or order] = Verdict(kind, order, chance, spent, low, middle, high)

    def _next(
        self,
        posterior: Posterior,
        done: Sequence[Run],
        possible: Sequence[Run],
        left: list[str],
        focus: list[Pair],
        spent: float,
        unstable: list[str],
    ) -> Step:
        """Choose the runs with the largest gain for their cost, or stop."""
        rest = self.budget * _ROUNDING - spent
        candidates = candidates_of(possible, done, left, rest)
        cells = {(run.arm, run.cell) for candidate in candidates for run in candidate.runs}
        affordable = [run for run in possible if (run.arm, run.cell) in cells]
        chances = chance_of_verdict(
            posterior, affordable, focus, self.rule.confidence, self.rule.margin
        )
        hopeful = [
            pair
            for pair in focus
            if chances[pair] >= self.rule.futile and self.far_enough(pair, [*done, *affordable])
        ]
        verdicts = list(self.verdicts.values())
        if not candidates or not hopeful:
            reason = "futile" if candidates else "budget" if possible else "all made"
            return Step(posterior, verdicts, left, spent, None, reason, unstable=unstable)
        wanted = {arm for pair in hopeful for arm in pair}
        left = [arm for arm in left if arm in wanted]
        candidates = candidates_of(possible, done, left, rest)
        if not candidates:
            return Step(posterior, verdicts, left, spent, None, "budget", unstable=unstable)
        lone: dict[Cell, list[str]] = {}
        for run in done:
            if run.cell not in posterior.observations.cells:
                lone.setdefault(run.cell, []).append(run.arm)
        scored = score(posterior, candidates, hopeful, lone)
        unit = sum(target.cost for target in self.targets.values())
        taken = best_of(scored, unit).candidate
        return Step(posterior, verdicts, left, spent, taken, "next", scored, unstable)
