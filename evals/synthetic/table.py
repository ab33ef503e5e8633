"""``python -m evals.synthetic table --out FILE``: all mixers of the registry on five tasks.

Every cell is a training of a few CPU minutes at most and is kept when it is finished, so that the
command can be stopped at any time and goes on where it was. FILE is written anew after each cell.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.synthetic.results import kept_result, result_of
from evals.synthetic.settings import SyntheticConfig, check_config
from evals.synthetic.tasks import TASKS
from evals.synthetic.training import LAST
from pretrain.common.config_loader import (
    Config,
    ConfigError,
    build_config,
    load_config,
    nearest,
    setting,
)
from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes
from pretrain.common.outputs import check_file, check_folder
from pretrain.common.screen import plain_console
from pretrain.model.spec import block_specs
from pretrain.nn.mixers import registry
from pretrain.parallel.processes import start_processes, stop_processes

SETTINGS = Path(__file__).parent / "table.yaml"
OUTPUT = "runs/synthetic-table"
# Sizes of a mixer in a narrow model, as far as it has them and they fit; the first that do count.
_SMALL: tuple[dict[str, Any], ...] = (
    {"num_heads": 4, "head_dim": 16},
    {"num_heads": 4},
    {"head_dim": 16},
    {},
)
_CHUNK = 32


@dataclass
class TableConfig(Config):
    """The cells of the table."""

    tasks: dict[str, dict[str, Any]]
    """Settings of a run by its task, and ``blocks``, the number of the model's."""
    minutes: float = setting(2.0, above=0)
    """CPU minutes after which a training stops unfinished."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of all runs."""
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of a run by its mixer, and in ``mixer`` those of the mixer itself."""


def main(arguments: Sequence[str]) -> int:
    """Run the cells that are missing, and write the table after each; 1 if one was refused."""
    options = _parser().parse_args(arguments)
    table = load_config(TableConfig, options.settings)
    tasks = _chosen(options.tasks, list(table.tasks), "--tasks", "task of the table")
    mixers = _chosen(options.mixers, list(registry()), "--mixers", "mixer")
    out, folder = Path(options.out), Path(options.output)
    check_file(out, "--out")
    check_folder(folder, "--output")
    cells = {(t, m): cell(table, t, m, options.settings) for t in tasks for m in mixers}
    console = plain_console(stderr=True, soft_wrap=True)
    refused = []
    start_processes()
    try:
        for number, ((task, mixer), config) in enumerate(cells.items(), 1):
            title = f"{number}/{len(cells)} {task}, {mixer}"
            try:
                result_of(config, folder, title)
            except (UserError, ValueError) as error:  # of a layer that this model does not suit
                console.print(f"{title}: refused: {error}")
                refused.append(title)
            found = {at: kept_result(config, folder) for at, config in cells.items()}
            write_bytes(out, markdown(found, table).encode())
    finally:
        stop_processes()
    console.print(f"written to {out}{f', without {len(refused)} refused cells' * bool(refused)}")
    return 1 if refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals.synthetic table", description=__doc__)
    parser.add_argument("--out", required=True, help="the Markdown file to write")
    parser.add_argument("--tasks", help="only these, separated by commas")
    parser.add_argument("--mixers", help="only these, separated by commas")
    parser.add_argument("--settings", default=str(SETTINGS), help="a YAML file of the cells")
    parser.add_argument("--output", default=OUTPUT, help=f"folder of finished cells ({OUTPUT})")
    return parser


def _chosen(given: str | None, known: list[str], option: str, what: str) -> list[str]:
    if given is None:
        return known
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise UserError(
                f"{option} names '{name}'{nearest(name, known)}, which is no {what}: expected some "
                f"of {', '.join(known)}"
            )
    return names


def cell(table: TableConfig, task: str, mixer: str, where: str) -> SyntheticConfig:
    """Return the settings of one cell; raises ConfigError naming what does not fit."""
    if task not in TASKS:
        raise ConfigError(
            f"{where}: tasks names '{task}'{nearest(task, list(TASKS))}, expected some of "
            f"{', '.join(TASKS)}"
        )
    at = f"{where}: {task}, {mixer}"
    values = {**table.settings, **table.tasks[task], **table.mixers.get(mixer, {})}
    blocks, own = values.pop("blocks", 1), values.pop("mixer", None)
    values |= {"task": task, "pattern": f"{blocks}*{mixer}", "minutes": table.minutes}
    for sizes in _SMALL if own is None else [own]:
        config = build_config(
            SyntheticConfig, {**values, "mixers": {mixer: _fitting(mixer, sizes)}}, at
        )
        try:
            check_config(config, at)
            block_specs(config.model(at), at)
            return config
        except ConfigError as error:
            refused = error
    raise refused


def _fitting(mixer: str, sizes: dict[str, Any]) -> dict[str, Any]:
    kind = registry()[mixer]
    names = {item.name for item in dataclasses.fields(kind.config_class)}
    found = {name: value for name, value in sizes.items() if name in names}
    if "chunk_size" in names and "chunk_size" in kind.speed_settings:
        found.setdefault("chunk_size", _CHUNK)
    return found


def markdown(found: dict[tuple[str, str], dict[str, Any] | None], table: TableConfig) -> str:
    """Return the table: a line per mixer, a column per task, and which cells are unfinished."""
    tasks, mixers = (list(dict.fromkeys(at[i] for at in found)) for i in (0, 1))
    heads = [f"{task} ({TASKS[task].chance:.3f})" for task in tasks]
    lines = [
        f"Accuracy at the last {LAST} scored positions of rows as long as in training / 4 times as "
        "long; in brackets that of a guess.",
        "",
        f"| mixer | {' | '.join(heads)} | CPU minutes |",
        "|" + "---|" * (len(tasks) + 2),
    ]
    for mixer in mixers:
        results = [found[task, mixer] for task in tasks]
        minutes = sum(result["minutes"] for result in results if result is not None)
        texts = [_cell_text(result) for result in results]
        lines.append(f"| `{mixer}` | {' | '.join(texts)} | {minutes:.1f} |")
    lines += ["", *_unfinished(found, table.minutes)]
    return "\n".join(lines) + "\n"


def _cell_text(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not run"
    short, *_, long = result["tests"]
    marked = "" if result["finished"] else "\\*"
    return f"{_number(short)} / {_number(long)}{marked}"


def _number(score: dict[str, Any]) -> str:
    value = score["accuracy"] if score["last"] is None else score["last"]
    return f"{value:.2f}"


def _unfinished(
    found: dict[tuple[str, str], dict[str, Any] | None], minutes: float
) -> Iterable[str]:
    cut = [
        f"{mixer} on {task} (step {len(result['losses'])} of {result['settings']['steps']})"
        for (task, mixer), result in found.items()
        if result is not None and not result["finished"]
    ]
    if cut:
        yield f"\\* stopped after {minutes:g} CPU minutes, before the rate had fallen: "
        yield f"{', '.join(cut)}."
    missing = sum(result is None for result in found.values())
    if missing:
        yield f"{missing} of {len(found)} cells have not been run."
