"""Decisions between arms in a report: the verdict, what was believed at what cost, every step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from evals.report.pictures import Pictures
from evals.scaling.decide import Posterior
from evals.scaling.decide.figure import draw_beliefs, draw_differences
from evals.scaling.decide.record import (
    TARGETS,
    VERDICT,
    campaign_of,
    is_decision,
    planned_runs,
    read_log,
    read_plan,
    runs_of_row,
    trunks_of,
)
from evals.scaling.figures import save
from pretrain.common.errors import UserError
from pretrain.common.screen import readable
from pretrain.run_arguments import expand_paths


def decision_sections(
    paths: Sequence[str | Path], out: Path, pictures: Pictures
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what the page says of each decision that ``paths`` are or hold, and what it lacks."""
    sections: list[dict[str, Any]] = []
    notes: list[str] = []
    for folder in _decisions(paths):
        try:
            sections.append(_section(folder, out, pictures, len(sections) + 1))
        except UserError as error:
            notes.append(str(error))
    return sections, notes


def _decisions(paths: Sequence[str | Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for path in expand_paths(paths):
        if path.is_dir():
            for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
                if is_decision(folder):
                    found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _section(folder: Path, out: Path, pictures: Pictures, number: int) -> dict[str, Any]:
    content, digest = read_plan(folder)
    rows = read_log(folder, digest)
    total = sum(target["cost"] for target in content["targets"].values())
    arms = sorted({arm for row in rows for arm in row.get("best", {})})
    posterior = _posterior(content, rows)
    drawn = []
    for name in ("differences", "beliefs"):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        if name == "differences":
            draw_differences(axes, rows, posterior)
            heading = "Worth of the arms by compute, and 95 % of what is believed at the target"
        else:
            draw_beliefs(axes, rows, total)
            heading = "P(best) by cost"
        path = save(figure, out / f"decision-{number}-{name}.png")
        drawn.append(pictures.embed(heading, path))
    target = next(iter(content["targets"].values()))
    settings = content["decide"]
    return {
        "name": folder.resolve().name,
        "said": _said(folder, rows),
        "targets": _targets(folder, digest),
        "question": f"Which of {', '.join(content['targets'])} is best at "
        f"{readable(target['parameters'])} parameters and {readable(target['tokens'])} tokens, by "
        f"{settings['metric']}, at confidence {settings['confidence']:g}, for at most "
        f"{settings['budget']:.0%} of the target runs (counted in {settings['cost']}).",
        "left_out": [f"{arm} was left out: {why}" for arm, why in content["left_out"].items()],
        "plan": digest,
        "arms": arms,
        "steps": [_step(i, row, arms, total) for i, row in enumerate(rows, 1)],
        "pictures": drawn if arms else [],
    }


def _said(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    try:
        return str(json.loads((folder / VERDICT).read_bytes())["said"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"It has not ended: {len(rows)} steps so far."


def _targets(folder: Path, digest: str) -> list[str]:
    """Return what the target runs say of the verdict, line by line, where they were made."""
    try:
        content = json.loads((folder / TARGETS).read_bytes())
        return [str(line) for line in content["said"]] if content["plan"] == digest else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _posterior(content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Posterior | None:
    """Return what is believed after the last line that believed anything."""
    told = [row for row in rows if "best" in row]
    if not told:
        return None
    done = runs_of_row(told[-1], planned_runs(content), trunks_of(content))
    return campaign_of(content).step(done, []).posterior


def _step(number: int, row: Mapping[str, Any], arms: Sequence[str], total: float) -> dict[str, Any]:
    best = row.get("best", {})
    return {
        "number": number,
        "runs": len(row["runs"]),
        "spent": f"{row['spent'] / total:.1%}",
        "best": [f"{best[arm]:.2f}" if arm in best else "" for arm in arms],
        "next": _next(row),
        "why": _why(row),
    }


def _next(row: Mapping[str, Any]) -> str:
    if row["taken"] is None:
        return "the end"
    _, size, tokens, seed = row["taken"][0]
    names = ", ".join(taken[0] for taken in row["taken"])
    return f"{readable(size)} parameters x {readable(tokens)} tokens, seed {seed}: {names}"


def _why(row: Mapping[str, Any]) -> str:
    unstable = f"; unstable: {', '.join(row['unstable'])}" if row["unstable"] else ""
    if row["taken"] is None:
        ends = {
            "budget": "no further run is within the budget",
            "all made": "every run that the decision may make was made",
            "futile": "no affordable run can be expected to change it",
            "unstable": "fewer than two arms are stable",
            "verdict": "it is sure enough",
        }
        return ends.get(row["reason"], row["reason"]) + unstable
    if not row["candidates"]:
        return "the two smallest sizes come first" + unstable
    arms, cell = [taken[0] for taken in row["taken"]], row["taken"][0][1:3]
    gain = next(c[4] for c in row["candidates"] if c[0] == arms and c[1:3] == cell)
    among = len(row["candidates"])
    others = f", of {among} candidates" if among > 1 else ", and is the only one affordable"
    return f"says most for its cost, {gain:.3g} nats{others}" + unstable
