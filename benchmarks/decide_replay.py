"""Replay decisions between arms on public ladders, against simpler ways to decide.

``python benchmarks/decide_replay.py [--data FOLDER] [--pairs 40] [--synthetic 40] [--only NAME]
[--done FILE]``: every file of the folder, whatever arms it has. ``--pairs`` are played alone, a
sample of each suite; all arms in one decision are played always. With ``--done`` what was finished
is kept there, and a second call goes on. ``right`` has the 95 % interval of a binomial share, which
takes pairs for independent: those of few arms are not.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decide_baselines import fixed_ladder, laws_per_arm, one_size
from benchmarks.decide_suites import DATA, Suite, suites
from evals.scaling.decide import LOSS, TASK, Campaign, Rule, Verdict, play
from evals.scaling.decide.simulate import TARGET, Kind, ladders

LEVELS = (0.90, 0.95, 0.99)
CLEAR = 0.004  # nats, under which the truth of suites without seeds is in doubt
KINDS: tuple[Kind, ...] = ("model", "laws", "turning", "equal")


def main() -> None:
    """Play everything that was asked for, and print a line for each part as it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--pairs", type=int, default=40, help="pairs of a suite played alone (40)")
    parser.add_argument("--synthetic", type=int, default=40, help="pairs of each made-up kind (40)")
    parser.add_argument("--only", default="", help="suites whose names begin so")
    parser.add_argument("--speed", action="store_true", help="time a step of the rule, no more")
    parser.add_argument("--done", type=Path, help="keep finished parts here, and go on from them")
    options = parser.parse_args()
    if options.speed:
        print(_speed())
        return
    kept = Kept(options.done)
    print("cost and spent: shares of the target runs of the arms\n")
    lines: dict[tuple[str, str, float], dict[str, Any]] = {}
    for suite in suites(options.data):
        if not suite.name.startswith(options.only):
            continue
        size = f"{len(suite.targets)} arms, {len(suite.pairs)} pairs, {len(suite.runs)} runs"
        print(f"{suite.name}: {size}")
        for label, make in _baselines(suite).items():
            print("  " + _words(label, kept.get(f"{suite.name}/{label}", make)), flush=True)
        for level in LEVELS:
            modes = {
                "all arms in one decision": partial(_together, suite, level),
                "each pair alone": partial(_alone, suite, level, options.pairs),
            }
            for mode, make in modes.items():
                if mode == "each pair alone" and not options.pairs:
                    continue
                name = f"{suite.name}/{mode}/{level}/{options.pairs * (mode[0] == 'e')}"
                found = kept.get(name, make)
                lines[suite.name, mode, level] = found
                print("  " + _words(f"{mode}, q {level:.2f}", found), flush=True)
        print()
    _summary(lines)
    if options.synthetic and not options.only:
        _synthetic(kept, options.synthetic)
    print(f"\n{_speed()}")


class Kept:
    """Results by name, in a file of JSON lines where one is given."""

    def __init__(self, path: Path | None) -> None:
        """Read what is there."""
        self.path, self.found = path, {}
        if path is not None and path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            self.found = {row["name"]: row["result"] for row in rows}

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a result that is kept, or make it and keep it."""
        if name not in self.found:
            self.found[name] = make()
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": name, "result": self.found[name]}) + "\n")
        return self.found[name]


def _baselines(suite: Suite) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "one size, one seed, the largest run in the budget": lambda: one_size(suite),
        "a law per arm, all runs in the budget": lambda: laws_per_arm(suite),
        "fixed ladder, all arms in one fit, one seed": lambda: fixed_ladder(suite, 1),
        "fixed ladder, all arms in one fit, all seeds": lambda: fixed_ladder(suite, 3),
    }


def _together(suite: Suite, level: float) -> dict[str, Any]:
    """Play one decision about every pair of the suite."""
    campaign = Campaign(
        suite.targets,
        suite.prior,
        _at(suite.rule, level),
        goal="pairs",
        pairs=suite.pairs,
        nats=suite.nats,
    )
    outcome = play(campaign, suite.runs, suite.price)
    found = _counts(suite, outcome.step.verdicts, len(suite.pairs))
    found["cost"] = outcome.step.spent / sum(t.cost for t in suite.targets.values())
    return found


def _alone(suite: Suite, level: float, count: int) -> dict[str, Any]:
    """Play a sample of the pairs, each as a decision of its own."""
    random = np.random.default_rng(0)
    order = sorted(random.permutation(len(suite.pairs))[:count].tolist())
    verdicts, spent = [], 0.0
    for index in order:
        pair = suite.pairs[index]
        targets = {arm: suite.targets[arm] for arm in pair}
        campaign = Campaign(targets, suite.prior, _at(suite.rule, level), nats=suite.nats)
        outcome = play(campaign, [run for run in suite.runs if run.arm in pair], suite.price)
        verdicts += outcome.step.verdicts
        spent += outcome.step.spent / sum(target.cost for target in targets.values())
    return {**_counts(suite, verdicts, len(order)), "cost": spent / max(len(order), 1)}


def _at(rule: Rule, level: float) -> Rule:
    return replace(rule, confidence=level)


def _counts(suite: Suite, verdicts: Iterable[Verdict], pairs: int) -> dict[str, Any]:
    named = [v for v in verdicts if v.kind == "better"]
    gaps = [suite.truth[v.pair[1]] - suite.truth[v.pair[0]] for v in named]
    targets = [sum(suite.targets[arm].cost for arm in v.pair) for v in named]
    shares = [v.spent / cost for v, cost in zip(named, targets, strict=True)]
    return {
        "pairs": pairs,
        "said": len(named),
        "right": sum(gap > 0 for gap in gaps),
        "clearly wrong": sum(gap < -CLEAR for gap in gaps),
        "when decided": float(np.median(shares)) if shares else None,
        "alike": sum(v.kind == "alike" for v in verdicts),
    }


def _words(label: str, found: dict[str, Any]) -> str:
    words = [f"{label:52}", f"cost {found['cost']:.3f}"]
    if "forced" in found:
        words.append(f"right of all {found['forced']:.3f}")
    if "said" in found:
        words.append(f"says {found['said']} of {found['pairs']}")
        words.append(f"right {_share(found['right'], found['said'])}")
    if found.get("clearly wrong"):
        words.append(f"wrong by over {CLEAR}: {found['clearly wrong']}")
    if found.get("alike"):
        words.append(f"no difference that matters {found['alike']}")
    if found.get("when decided") is not None:
        words.append(f"decided at {found['when decided']:.3f}")
    return "  ".join(words)


def _share(right: int, said: int) -> str:
    from scipy.stats import binomtest

    if not said:
        return "-"
    low, high = binomtest(right, said).proportion_ci(method="wilson")
    return f"{right} of {said} = {right / said:.3f} [{low:.2f}, {high:.2f}]"


def _summary(lines: dict[tuple[str, str, float], dict[str, Any]]) -> None:
    """Print what was said at each confidence, every pair and target once.

    Left out are the arms of DataDecide whose order is luck, and second budgets of a suite.
    """
    print("DataDecide's stable arms and the other suites together, at the budget of the design")
    for mode in ("all arms in one decision", "each pair alone"):
        for level in LEVELS:
            parts = [
                found
                for (name, m, q), found in lines.items()
                if (m, q) == (mode, level) and not name.endswith(("all arms", "budget 0.75"))
            ]
            said, right = (sum(part[key] for part in parts) for key in ("said", "right"))
            pairs = sum(part["pairs"] for part in parts)
            if pairs:
                share = _share(right, said)
                print(f"  {mode}, q {level:.2f}: says {said} of {pairs}, right {share}")
    print()
    print("What does not hold: shares right below the confidence, of five verdicts or more")
    for (name, mode, level), found in lines.items():
        if found["said"] >= 5 and found["right"] < level * found["said"]:
            print(f"  {name}, {mode}, q {level:.2f}: {_share(found['right'], found['said'])}")
    print()


def _synthetic(kept: Kept, count: int) -> None:
    """Print what is said of made-up pairs; of equal arms any winner is wrong."""
    print("made-up pairs, six sizes, target 1B, q 0.95")
    for kind in KINDS:
        for prior in (TASK, LOSS):
            name = f"synthetic/{kind}/{prior.name}/{count}"
            found = kept.get(name, partial(_play_made_up, kind, prior, count))
            print("  " + _words(f"{kind}, prior of a {prior.name}", found), flush=True)


def _speed() -> str:
    """Return how long a step takes with 5 arms, 60 runs and 40 candidates, the least of five."""
    arms = ("a", "b", "c", "d", "e")
    sizes = tuple(20e6 * 1.4**i for i in range(12))
    # Nothing is said, so that all arms and pairs stay and all candidates are weighed.
    rule = Rule(confidence=0.9999, margin=1e-9, budget=100.0, futile=0.0)
    best, count = math.inf, 0
    for seed in range(5):
        done, _ = ladders("equal", LOSS, np.random.default_rng(seed), arms, sizes=sizes, seeds=1)
        longer = [
            replace(run, seed=1, tokens=times * run.tokens, cost=0.0)
            for times in (1, 1.5, 2, 3)
            for run in done
        ]
        cells = sorted({run.cell for run in longer})[:40]
        campaign = Campaign(dict.fromkeys(arms, TARGET), LOSS, rule, goal="pairs")
        begun = time.process_time()
        step = campaign.step(done, [run for run in longer if run.cell in cells])
        best, count = min(best, time.process_time() - begun), len(step.scored)
        if len(step.left) < len(arms):
            raise RuntimeError("an arm was left out, so that less was weighed than is said")
    return (
        f"a step with {len(arms)} arms, {len(done)} runs, {count} candidates: {best:.2f} s of CPU "
        "time, the least of five"
    )


def _play_made_up(kind: Kind, prior: Any, count: int) -> dict[str, Any]:
    named, right, alike, spent = 0, 0, 0, 0.0
    for index in range(count):
        runs, truth = ladders(kind, prior, np.random.default_rng([index, KINDS.index(kind)]))
        outcome = play(Campaign(dict.fromkeys("ab", TARGET), prior, Rule()), runs)
        spent += outcome.step.spent / (2 * TARGET.cost)
        for verdict in outcome.step.verdicts:
            first, second = verdict.pair
            named += verdict.kind == "better"
            alike += verdict.kind == "alike"
            right += verdict.kind == "better" and truth[first] < truth[second]
    return {"pairs": count, "said": named, "right": right, "alike": alike, "cost": spent / count}


if __name__ == "__main__":
    main()
