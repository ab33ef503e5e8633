"""``python -m launch decide``: start the runs that a decision asks for, until it ends."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.scaling.decide import Campaign, Run, Step
from evals.scaling.decide.figure import PICTURE, draw
from evals.scaling.decide.record import VERDICT, read_log, runs_of_row
from evals.scaling.decide.trunks import key_of
from launch.commands import console_of
from launch.decisions.checking import check
from launch.decisions.lock import hold
from launch.decisions.log import append, as_logged, last_hash, line_of, write_plan
from launch.decisions.plan import Plan, load_plan
from launch.decisions.pricing import show_prices
from launch.decisions.running import asked, execute
from launch.decisions.tables import replay
from launch.decisions.targets import check_by_targets
from launch.decisions.words import COUNTED, step_words, verdict_words
from pretrain.common.errors import EXIT_STOPPED, UserError
from pretrain.common.files import write_json


def decide(arguments: Sequence[str]) -> int:
    """Decide between arms, or show, check or replay a decision."""
    words = list(arguments)
    what = words.pop(0) if words[:1] in (["status"], ["targets"]) else None
    options = _parser().parse_intermixed_args(words)
    if not 0.5 < options.confidence < 1:
        raise UserError(f"--confidence is {options.confidence}, expected between 0.5 and 1")
    for name in ("at_once", "processes", "seeds"):
        found = getattr(options, name)
        if found is not None and found < 1:
            raise UserError(f"--{name.replace('_', '-')} is {found}, expected 1 or more")
    if not options.budget > 0:
        raise UserError(f"--budget is {options.budget}, expected a share above 0")
    console = console_of()

    def show(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    if options.replay:
        return replay(options, show)
    if options.config is None:
        raise UserError("no config was given, expected a file with a section decide, or --replay")
    if options.check:
        show(check(Path(options.config)))
        return 0
    plan = load_plan(options.config, options.overrides)
    for arm, why in plan.left_out.items():
        show(f"arm {arm} is left out, it cannot be planned: {why}")
    if options.dry_run:
        show_prices(plan, console, show)
        return 0
    if what == "status":
        return _status(plan, show)
    if what == "targets":
        with hold(plan.directory):
            return check_by_targets(plan, options, show)
    if options.ask:
        return _ask(plan, options.ask, show)
    if options.next:
        return _next(plan, show)
    with hold(plan.directory):
        return _Decision(plan, options, show).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch decide",
        description="Say which of several arms is better at a target, for how sure, by the fewest "
        "runs; or that it cannot be told. 'status CONFIG' shows how far it is; 'targets CONFIG' "
        "then trains the arms at the target, and says whether the verdict was right.",
        epilog="Exit status: 0 it ended, 2 bad input, 75 runs were stopped or submitted (run the "
        "same command again to go on).",
    )
    parser.add_argument("config", nargs="?", help="file with a section decide; a folder to check")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--dry-run", action="store_true", help="show prices, start nothing")
    parser.add_argument("--next", action="store_true", help="show the next runs and why")
    parser.add_argument("--ask", nargs="+", metavar="RUN", help="use finished runs, start nothing")
    parser.add_argument("--check", action="store_true", help="recompute a decision's directory")
    parser.add_argument("--cluster", help="submit the runs to Slurm, a file of configs/clusters")
    parser.add_argument("--at-once", type=int, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=1, help="of targets: runs of each arm (1)")
    parser.add_argument("--processes", type=int, help="processes of each run")
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="start failed runs of this round, or of targets, again",
    )
    parser.add_argument("--replay", metavar="TABLE", help="play a CSV file of finished runs")
    parser.add_argument("--target", help="of a replay: PARAMETERS:TOKENS")
    parser.add_argument("--arms", help="of a replay: some arms, with ; between them")
    parser.add_argument("--metric", default="loss", help="of a replay: its column (loss)")
    parser.add_argument("--prior", choices=("loss", "task"), default="loss", help="of a replay")
    parser.add_argument("--data-arms", action="store_true", help="of a replay: arms are corpora")
    parser.add_argument("--confidence", type=float, default=0.95, help="of a replay (0.95)")
    parser.add_argument("--budget", type=float, default=0.3, help="of a replay (0.3)")
    parser.add_argument("--span", type=float, default=8.0, help="of a replay (8)")
    return parser


class _Decision:
    """A decision in its directory, from wherever its log ends."""

    def __init__(self, plan: Plan, options: Any, show: Any) -> None:
        self.plan, self.options, self.show = plan, options, show
        self.total = sum(target.cost for target in plan.targets.values())

    def run(self) -> int:
        """Go on until the decision ends, or a run is stopped."""
        plan = self.plan
        write_plan(plan.directory, plan.content(), plan.digest)
        rows = read_log(plan.directory, plan.digest)
        campaign, done, taken = _resumed(plan, rows)
        if rows and taken is None:
            return self._again(done)
        while True:
            if taken:
                found = execute(plan, taken, done, self.options, self.show)
                if found is None:
                    draw(plan.directory, rows, None, self.total)
                    return EXIT_STOPPED
                done += as_logged([plan.trunks.priced(run, done) for run in found])
            step = campaign.step(done, plan.left(done))
            line = line_of(step, done, plan.digest, last_hash(rows))
            append(plan.directory, line, rows)
            rows = read_log(plan.directory, plan.digest)
            self.show(step_words(len(rows), step, self.total))
            if step.taken is None:
                draw(plan.directory, rows, step.posterior, self.total)
                return self._end(step, done)
            known = {key_of(run): run for run in plan.runs}  # at the price of all of them
            taken = [known[key_of(run)] for run in step.taken.runs]

    def _again(self, done: list[Run]) -> int:
        return self._end(self.plan.campaign().step(done, self.plan.left(done)), done)

    def _end(self, step: Step, done: list[Run]) -> int:
        words = _verdict(self.plan, step, done)
        kind = step.verdicts[-1].kind if step.verdicts else "cannot be told"
        content = {"verdict": kind, "reason": step.reason, "said": words, "plan": self.plan.digest}
        write_json(self.plan.directory / VERDICT, content)
        self.show(words)
        self.show(f"written to {self.plan.directory / VERDICT}; beliefs: {PICTURE}")
        return 0


def _verdict(plan: Plan, step: Step, done: Sequence[Run]) -> str:
    target = next(iter(plan.targets.values()))
    slope = None
    if step.posterior is not None:
        slope = step.posterior.observations.slope((target.parameters, target.tokens))
    counted = COUNTED[plan.settings.cost]
    return verdict_words(step, plan.targets, plan.settings.confidence, done, slope, counted)


def _resumed(
    plan: Plan, rows: Sequence[dict[str, Any]]
) -> tuple[Campaign, list[Run], list[Run] | None]:
    """Return the decision, the runs that its last line knows, and those it asked for."""
    if not rows:
        return plan.campaign(), [], []
    known = {key_of(run): run for run in plan.runs}
    taken = rows[-1]["taken"]
    if taken is not None:
        taken = [known[arm, (size, tokens), seed] for arm, size, tokens, seed in taken]
    return plan.campaign(), runs_of_row(rows[-1], plan.runs, plan.trunks), taken


def _next(plan: Plan, show: Any) -> int:
    rows = read_log(plan.directory, plan.digest)
    _, done, taken = _resumed(plan, rows)
    total = sum(target.cost for target in plan.targets.values())
    step = plan.campaign().step(done, plan.left(done))
    show(step_words(len(rows), step, total))
    if taken is None:
        show(_verdict(plan, step, done))
    return 0


def _status(plan: Plan, show: Any) -> int:
    rows = read_log(plan.directory, plan.digest)
    if not rows:
        show(f"{plan.directory}: nothing was decided or run yet")
        return 0
    total = sum(target.cost for target in plan.targets.values())
    for number, row in enumerate(rows, 1):
        best = ", ".join(f"{arm} {p:.2f}" for arm, p in row.get("best", {}).items())
        show(
            f"step {number}  {len(row['runs'])} runs  cost {row['spent'] / total:.1%}  "
            f"P(best): {best or 'nothing yet'}"
        )
    taken = rows[-1]["taken"]
    if taken is None:
        return _next(plan, show)
    names = [plan.members[arm, (n, d), seed].name for arm, n, d, seed in taken]
    show(f"asked for, not in the log yet: {', '.join(names)}")
    return 0


def _ask(plan: Plan, words: Sequence[str], show: Any) -> int:
    done = asked(plan, words, show)
    total = sum(target.cost for target in plan.targets.values())
    step = plan.campaign().step(done, plan.left(done))
    show(step_words(len(done), step, total))
    if step.taken is None:
        show(_verdict(plan, step, done))
    return 0
