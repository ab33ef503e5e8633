"""``python -m evals.synthetic claim NAME``: run a claim's arms, and exit 0 if it holds, else 1.

Finished runs are kept in the folder, so that an interrupted command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.synthetic.claims.checks import CHECKS
from evals.synthetic.claims.judging import judge, measures_of, sentence
from evals.synthetic.claims.schema import Claim, claim_names, load_claim, reduced_claim
from evals.synthetic.claims.showing import draw, table_of, verdict_line
from evals.synthetic.results import result_of
from evals.synthetic.settings import SyntheticConfig
from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.common.outputs import check_folder
from pretrain.common.screen import plain_console, show_table
from pretrain.parallel.processes import start_processes, stop_processes

OUTPUT = "runs/claims"


def main(arguments: Sequence[str]) -> int:
    """Run a claim and return 0 if it holds, 1 if not; or list all claims."""
    parser = argparse.ArgumentParser(prog="python -m evals.synthetic claim", description=__doc__)
    parser.add_argument("name", help="a claim's name, or 'list'")
    parser.add_argument("--output", default=OUTPUT, help=f"folder of the results ({OUTPUT})")
    parser.add_argument(
        "--reduced", action="store_true", help="the claim's small form, if it has one"
    )
    options = parser.parse_args(arguments)
    console = plain_console(soft_wrap=True)
    if options.name == "list":
        for known in claim_names():
            console.print("\n".join(_lines(known)))
        return 0
    name, claim = options.name, load_claim(options.name)
    if options.reduced:
        name, claim = f"{name}-reduced", reduced_claim(claim, name)
    check_folder(Path(options.output), "--output")
    start_processes()
    try:
        return run_claim(name, claim, Path(options.output) / name)
    finally:
        stop_processes()


def run_claim(name: str, claim: Claim, folder: Path) -> int:
    """Run what is missing of a claim, show and write the outcome, and return 0 if it holds."""
    found: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in claim.arms}
    for seed in claim.seeds:
        for arm in claim.arms:
            found[arm][seed] = _measured(name, claim, arm, seed, folder)
    verdicts = judge(claim, found)
    held = all(verdict.held for verdict in verdicts)
    outcome: dict[str, Any] = {
        "claim": dataclasses.asdict(claim),
        "held": held,
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
        "measures": found,
    }
    write_json(folder / "outcome.json", outcome)
    picture = draw(name, claim, found, verdicts, folder / f"{name}.png")
    console = plain_console(soft_wrap=True)
    console.print(f"{name}: {claim.claim} ({claim.source})")
    show_table(table_of(claim, found))
    for verdict in verdicts:
        console.print(verdict_line(verdict))
    console.print(f"the claim {'holds' if held else 'does not hold'} here; picture: {picture}")
    return 0 if held else 1


def _measured(name: str, claim: Claim, arm: str, seed: int, folder: Path) -> dict[str, float]:
    title = f"{name}, {arm}"

    def train(config: SyntheticConfig) -> dict[str, Any]:
        result = result_of(config, folder, f"{title}, {config.decay}")
        return _finished(result, config)

    if claim.check is None:
        config = claim.config(arm, seed, f"{name}.yaml")
        return measures_of(_finished(result_of(config, folder, title), config))
    settings = {**claim.settings, **claim.arms[arm]}
    path = folder / f"{claim.check}-{list(claim.arms).index(arm)}-{seed}.json"
    if path.is_file():
        known = json.loads(path.read_text())
        if known["settings"] == settings:
            measures: dict[str, float] = known["measures"]
            return measures
    folder.mkdir(parents=True, exist_ok=True)
    measures = CHECKS[claim.check](settings, seed, train)
    write_json(path, {"settings": settings, "measures": measures})
    return measures


def _finished(result: dict[str, Any], config: SyntheticConfig) -> dict[str, Any]:
    if not result["finished"]:
        raise UserError(
            f"a run of {config.pattern} on {config.task} stopped after its {config.minutes:g} CPU "
            "minutes, expected all its steps: a claim has no limit on time"
        )
    return result


def _lines(name: str) -> list[str]:
    """Return what ``claim list`` says of a claim."""
    claim = load_claim(name)
    cost = f"{'' if claim.measured else 'about '}{claim.minutes:g} CPU minutes"
    lines = [
        f"{name}: {claim.claim}",
        f"  {claim.source}; {cost}, {len(claim.arms)} arms by {len(claim.seeds)} seeds",
    ]
    for criterion in claim.holds:
        some = criterion.seeds is not None and criterion.seeds < len(claim.seeds)
        lines.append(
            f"  holds if {sentence(criterion)}"
            f"{f', for {criterion.seeds} of the seeds' if some else ''}"
        )
    if claim.reduced is not None:
        small = reduced_claim(claim, name)
        lines.append(
            f"  --reduced: {small.minutes:g} CPU minutes, {len(small.arms)} arms by "
            f"{len(small.seeds)} seeds"
        )
    return lines
