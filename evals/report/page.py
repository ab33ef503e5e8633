"""Write the report: a self-contained ``report.html``, and its pictures as PNG files too."""

from __future__ import annotations

import argparse
import base64
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from evals.report.blocks import draw_blocks
from evals.report.figures import draw_losses, draw_speeds
from evals.report.runs import Group, Run, find_runs, grouped, matches_of
from evals.report.scores import score_names
from pretrain.common.files import write_bytes
from pretrain.common.outputs import check_folder
from pretrain.common.screen import readable

_MOST_NAMES = 4  # in the title
_MOST_MAPS = 6  # of blocks: each picture is as large as all curves
TITLES = {"tokens": "Loss by tokens", "flops": "Loss by training FLOPs", "seconds": "Loss by time"}


def main(arguments: Sequence[str]) -> int:
    """Write the report that ``arguments`` ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m evals report", description="Write a page about runs and grids of runs."
    )
    parser.add_argument("runs", nargs="+", help="run directories, grids, folders or globs of them")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/report"), help="output folder (runs/report)"
    )
    parser.add_argument("--title", help="the page's title (the folders' names)")
    parser.add_argument("--no-fits", action="store_true", help="omit the scaling fits")
    given = parser.parse_args(arguments)
    check_folder(given.out, "--out")
    page = make_report(given.runs, given.out, given.title, fits=not given.no_fits)
    print(f"written to {page}")
    return 0


def make_report(
    paths: Sequence[str | Path], out: Path, title: str | None = None, *, fits: bool = True
) -> Path:
    """Write ``out/report.html`` and its pictures, and return the page's path.

    Raises UserError where there is no run.
    """
    runs, notes = find_runs(paths)
    groups = grouped(runs)
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for over, heading in TITLES.items():
        path = draw_losses(groups, over, out / f"loss-by-{over}.png")
        if path is not None:
            pictures.append(_picture(heading, path))
    path = draw_speeds(groups, out / "speed.png")
    if path is not None:
        pictures.append(_picture("Speed", path))
    maps = _maps_of_blocks([run for group in groups for run in group.runs], out)
    scaling = _scaling(paths, out) if fits else []
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"])
    )
    html = environment.get_template("report.html.j2").render(
        title=title or _title(paths),
        pictures=pictures,
        maps=maps,
        scaling=scaling,
        table=_table(groups),
        notes=[*matches_of(paths), *notes],
        counts=f"{len(runs)} runs, {len(groups)} settings",
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    page = out / "report.html"
    write_bytes(page, html.encode(errors="replace"))
    return page


def _title(paths: Sequence[str | Path]) -> str:
    names = [Path(path).resolve().name for path in paths]
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _picture(heading: str, path: Path) -> dict[str, str]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"heading": heading, "data": f"data:image/png;base64,{data}", "name": path.name}


def _maps_of_blocks(runs: Sequence[Run], out: Path) -> list[dict[str, str]]:
    """Return the pictures of the best runs that have statistics of blocks."""
    found: list[dict[str, str]] = []
    for number, run in enumerate(runs, 1):
        if len(found) == _MOST_MAPS:
            break
        path = draw_blocks(run, out / f"blocks-{number}.png")
        if path is not None:
            found.append(_picture(run.name, path))
    return found


def _table(groups: Sequence[Group]) -> dict[str, Any]:
    """Return the table's columns and rows; a cell has a text and a value to sort by."""
    settings = list(dict.fromkeys(k for g in groups for k in g.differing))
    scores = score_names([s for g in groups for r in g.runs for s in r.scores])
    measures: list[tuple[str, Any, str]] = [
        ("parameters", lambda r: r.parameters, "{:,.0f}"),
        ("tokens", lambda r: r.tokens[-1], "{:,.0f}"),
        ("final loss", lambda r: r.final, "{:.4f}"),
        ("best loss", lambda r: r.best, "{:.4f}"),
        ("validation loss", lambda r: r.valid[-1][1] if r.valid else None, "{:.4f}"),
        ("bits per byte", lambda r: r.valid[-1][2] if r.valid else None, "{:.4f}"),
        ("tokens/s", lambda r: r.tokens_per_second, "{:,.0f}"),
        ("MFU %", lambda r: None if r.mfu is None else 100 * r.mfu, "{:.1f}"),
        ("hours", lambda r: r.seconds[-1] / 3600, "{:,.3f}"),
        *(
            (
                name,
                lambda r, k=kind: next((s.value for s in r.scores if s.kind == k), None),
                "{:.4f}",
            )
            for kind, name in scores.items()
        ),
    ]
    rows = []
    for group in groups:
        cells = [_cell(group.differing.get(k)) for k in settings] or [_cell(group.label)]
        seeds = len(group.runs)
        cells.append({"text": str(seeds), "sort": seeds})
        for _, value, form in measures:
            found = group.mean([value(run) for run in group.runs])
            if found is None:
                cells.append({"text": "", "sort": ""})
                continue
            mean, spread = found
            text = form.format(mean) + (f" ± {form.format(spread)}" if spread else "")
            cells.append({"text": text, "sort": mean})
        states = sorted({run.state for run in group.runs})
        cells.append({"text": "; ".join(states), "sort": states[0]})
        rows.append(cells)
    names = [*(settings or ["run"]), "runs", *(name for name, _, _ in measures), "state"]
    kept = [i for i in range(len(names)) if any(row[i]["text"] for row in rows)]
    numbers = [any(not isinstance(row[i]["sort"], str) for row in rows) for i in kept]
    columns = [{"name": names[i], "number": n} for i, n in zip(kept, numbers, strict=True)]
    return {"columns": columns, "rows": [[row[i] for i in kept] for row in rows]}


def _cell(value: Any) -> dict[str, Any]:
    if value is None:
        return {"text": "-", "sort": ""}
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {"text": str(value), "sort": str(value)}
    return {"text": readable(value, 6) if isinstance(value, float) else f"{value:,}", "sort": value}


def _scaling(paths: Sequence[str | Path], out: Path) -> list[dict[str, Any]]:
    from evals.report.laws import scaling_sections

    sections = scaling_sections(paths, out)
    for section in sections:
        if "file" in section:
            section["picture"] = _picture(section["title"], section["file"])
    return sections
