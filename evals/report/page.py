"""Write the report: a self-contained ``report.html``, and pictures as PNG files beside it."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from evals.report.blocks import draw_blocks
from evals.report.curves import MOST_POINTS, make_curves
from evals.report.decisions import decision_sections
from evals.report.figures import draw_losses, draw_speeds
from evals.report.groups import grouped
from evals.report.pictures import Pictures
from evals.report.runs import Run, find_runs, matches_of
from evals.report.tables import make_tables, shared
from evals.report.times import times_by_arm
from pretrain.common.files import write_bytes
from pretrain.common.outputs import check_folder

_MOST_NAMES = 4  # in the title
_MOST_MAPS = 6  # of blocks: each picture is as large as all curves


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
    for over in ("tokens", "flops", "seconds"):
        draw_losses(groups, over, out / f"loss-by-{over}.png")
    draw_speeds(groups, out / "speed.png")
    pictures = Pictures()
    decisions, undecided = decision_sections(paths, out, pictures)
    scaling = _scaling(paths, out, pictures) if fits else []
    maps = _maps_of_blocks([run for group in groups for run in group.runs], out, pictures)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"])
    )
    html = environment.get_template("report.html.j2").render(
        title=title or _title(paths),
        decisions=decisions,
        curves=make_curves(groups),
        most_points=MOST_POINTS,
        borders=any(run.borders for run in runs),
        times=times_by_arm(groups),
        maps=maps,
        scaling=scaling,
        tables=make_tables(groups),
        shared=shared(groups),
        css=Markup(_read("report.css")),
        script=Markup(_read("report.js")),
        notes=[*matches_of(paths), *notes, *undecided],
        counts=f"{_count(len(runs), 'run')}, {_count(len(groups), 'setting')}",
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    page = out / "report.html"
    write_bytes(page, html.encode(errors="replace"))
    return page


def _title(paths: Sequence[str | Path]) -> str:
    names = [Path(path).resolve().name for path in paths]
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _maps_of_blocks(runs: Sequence[Run], out: Path, pictures: Pictures) -> list[dict[str, str]]:
    """Return the pictures of the best runs that have statistics of blocks."""
    found: list[dict[str, str]] = []
    for number, run in enumerate(runs, 1):
        if len(found) == _MOST_MAPS:
            break
        path = draw_blocks(run, out / f"blocks-{number}.png")
        if path is not None:
            found.append(pictures.embed(run.name, path))
    return found


def _scaling(paths: Sequence[str | Path], out: Path, pictures: Pictures) -> list[dict[str, Any]]:
    from evals.report.laws import scaling_sections

    sections = scaling_sections(paths, out)
    for section in sections:
        if "file" in section:
            section["picture"] = pictures.embed(section["title"], section["file"])
    return sections
