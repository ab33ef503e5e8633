"""The public ladders of ``benchmarks/data/decide`` as decisions to replay."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean

from evals.scaling.decide import LOSS, TASK, Prior, Rule, Run, Target
from evals.scaling.decide.replay import Price, branched

DATA = Path(__file__).parent / "data/decide"
LIKE_SIZE = 1.3  # shapes whose parameters differ by less are compared


@dataclass
class Suite:
    """Arms with their targets, what has been run below them, and how it came out."""

    name: str
    targets: dict[str, Target]
    runs: list[Run]
    truth: dict[str, float]
    prior: Prior
    rule: Rule = field(default_factory=Rule)
    price: Price | None = None
    nats: bool = False

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs with one target, which alone are compared."""
        return [
            pair
            for pair in combinations(self.targets, 2)
            if self.targets[pair[0]] == self.targets[pair[1]]
        ]


def spread_grows_by_design(arm: str) -> bool:
    """Return whether an arm of DataDecide has Flan in its mix: its order at 1B is partly luck."""
    return (arm.startswith("Dolma1") and "no Flan" not in arm) or "/ Dolma" in arm


def suites(folder: Path = DATA) -> list[Suite]:
    """Read all files of a folder like ``benchmarks/data/decide``, with whatever arms they have."""
    readers: dict[str, Callable[[list[dict[str, str]]], list[Suite]]] = {
        "datadecide": _datadecide,
        "optimizers": _optimizers,
        "shapes": _shapes,
        "corpora": _corpora,
    }
    found = []
    for name, reader in readers.items():
        path = folder / f"{name}.csv"
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                found += reader(list(csv.DictReader(file)))
    return found


def _run(row: dict[str, str], column: str, seed: int = 0) -> Run:
    return Run(row["arm"], float(row["parameters"]), float(row["tokens"]), seed, float(row[column]))


def _suite(
    name: str, runs: list[Run], target: Target, prior: Prior, rule: Rule, *, nats: bool
) -> Suite:
    """Return the suite of one target: the runs at it are the truth, those below it the table."""
    at = (target.parameters, target.tokens)
    values = defaultdict(list)
    for run in runs:
        if run.cell == at:
            values[run.arm].append(run.value)
    truth = {arm: fmean(found) for arm, found in values.items()}
    below = [
        run
        for run in runs
        if run.arm in truth and run.compute < target.compute and run.parameters <= at[0]
    ]
    return Suite(name, dict.fromkeys(sorted(truth), target), below, truth, prior, rule, nats=nats)


def _datadecide(rows: list[dict[str, str]]) -> list[Suite]:
    runs = [_run(row, "nll", int(row["seed"])) for row in rows]
    target, prior = Target(1e9, 1e11), TASK.for_data()
    stable = [run for run in runs if not spread_grows_by_design(run.arm)]
    return [
        _suite("datadecide, stable arms", stable, target, prior, Rule(), nats=False),
        _suite("datadecide, all arms", runs, target, prior, Rule(), nats=False),
    ]


def _optimizers(rows: list[dict[str, str]]) -> list[Suite]:
    runs = [_run(row, "loss") for row in rows]
    found = []
    for size, times in ((536870912, (2, 8)), (1207959552, (1, 2, 4, 8))):
        for ratio in times:
            target = Target(float(size), 20.0 * ratio * size)
            name = f"optimizers, {size / 1e9:.2g}B at {ratio}x"
            for budget in (0.3, 0.75):
                rule = Rule(span=2, budget=budget)
                label = f"{name}, budget {budget}"
                found.append(_suite(label, runs, target, LOSS, rule, nats=True))
    return [suite for suite in found if len(suite.targets) > 1]


def _shapes(rows: list[dict[str, str]]) -> list[Suite]:
    """Read the decayed points: lengths of one size each, by groups of arms of like size."""
    sizes = sorted({(float(row["parameters"]), row["arm"]) for row in rows})
    nominal: dict[str, float] = {}
    for size, arm in sizes:
        started = max(nominal.values(), default=0.0)
        nominal[arm] = started if started and size < LIKE_SIZE * started else size
    decayed = [row for row in rows if row["stage"] == "after_decay"]
    lengths = sorted({float(row["tokens"]) for row in decayed})
    end = min(lengths, key=lambda tokens: abs(tokens - 99e9))
    runs, truth = [], {}
    for row in decayed:
        length, size = float(row["tokens"]), nominal[row["arm"]]
        if length == end:
            truth[row["arm"]] = float(row["loss"])
        elif length <= 45e9:
            runs.append(Run(row["arm"], size, length, 0, float(row["loss"])))
    targets = {arm: Target(nominal[arm], end) for arm in sorted(truth)}
    rule = Rule(span=2, budget=1.0)
    return [Suite("shapes, 99 B tokens", targets, runs, truth, LOSS, rule, branched(0.1), True)]


def _corpora(rows: list[dict[str, str]]) -> list[Suite]:
    runs = [_run(row, "loss_c4") for row in rows]
    found = []
    for size, ratio in ((411616256, 16), (1439795200, 1), (6889410560, 1)):
        target = Target(float(size), 20.0 * ratio * size)
        name = f"corpora, {size / 1e9:.2g}B at {ratio}x"
        found.append(_suite(name, runs, target, LOSS.for_data(), Rule(), nats=True))
    return [suite for suite in found if len(suite.targets) > 1]
