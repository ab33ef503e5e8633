"""Read what programs log: tables, wandb exports, TensorBoard, trainer_state.json, text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.scaling.columns import find_column, is_known, is_known_tag, missing_column
from evals.scaling.parameters import Array
from pretrain.common.errors import UserError
from pretrain.run_directory import METRICS_FILE

TABLES = (".csv", ".tsv", ".parquet")
TEXTS = (".log", ".txt", ".out")
TRAINER_STATE = "trainer_state.json"
READ = (
    ".csv, .tsv, .parquet, .jsonl, trainer_state.json, a log of Megatron-LM or TensorBoard events"
)
# TensorBoard's own export has a file for each tag: run-NAME-tag-train_loss.csv.
_TENSORBOARD = re.compile(r"run-(?P<run>.+)-tag-(?P<tag>.+)")
_SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


@dataclass
class Series:
    """Values and the steps, or tokens, at which they were logged, in the order of the file."""

    step: Array
    value: Array

    def ordered(self) -> Series:
        """Return the finite values by ascending step; of one logged twice, the last."""
        last = {s: i for i, s in enumerate(self.step.tolist()) if math.isfinite(self.value[i])}
        kept = np.array([last[s] for s in sorted(last)], dtype=np.int64)
        return Series(self.step[kept], self.value[kept])


@dataclass
class Log:
    """The log of one run, as its file has it.

    where: the file, for messages; path: what tells logs of one name apart; loss: None in a file
    of learning rates alone; clock: the tokens, or else samples, seen at steps, None where not
    logged; in_tokens: whether the axis counts tokens instead of steps.
    """

    name: str
    where: str
    path: Path
    loss: Series | None
    lr: Series | None = None
    clock: Series | None = None
    clock_is: str = "tokens"
    in_tokens: bool = False
    parameters: float | None = None


def read_logs(path: Path, columns: Mapping[str, str] | None = None) -> list[Log]:
    """Read the logs in a file, or of a folder; raises UserError for what cannot be read."""
    if path.is_dir():
        return joined([log for file in _files(path) for log in read_logs(file, columns)])
    if path.name.startswith("events.out.tfevents."):
        return [_events(path, path.parent, columns)]
    if path.suffix in TABLES:
        return _of_frame(path, read_frame(path), columns)
    if path.suffix in (".jsonl", ".json"):
        return _of_frame(path, _json_frame(path), columns)
    if path.suffix in TEXTS:
        return _of_frame(path, _text_frame(path), columns)
    raise UserError(f"{path}: expected a run directory, {READ}")


def _files(folder: Path) -> list[Path]:
    events = sorted(folder.rglob("events.out.tfevents.*"))
    if events:
        return _event_files(events)
    states = [folder / TRAINER_STATE, *folder.glob(f"checkpoint-*/{TRAINER_STATE}")]
    states = [s for s in states if s.exists()]
    if states:  # the last checkpoint of a run knows all, and its own folder is written at the end
        return [max(states, key=lambda s: (s.parent == folder, len(s.parent.name), s))]
    files = [p for p in sorted(folder.iterdir()) if p.suffix in TABLES]
    if not files:
        raise UserError(
            f"{folder}: holds no {METRICS_FILE}, CSV, Parquet or TensorBoard event file"
        )
    return files


def read_frame(path: Path) -> Any:
    """Return the table of a CSV or Parquet file, whatever separates its columns.

    Raises UserError for a file that is none.
    """
    import pandas

    try:
        if path.suffix == ".parquet":
            return pandas.read_parquet(path)
        with path.open(encoding="utf-8", errors="replace") as lines:
            head, first = lines.readline(), lines.readline()
        separator = max(",;\t", key=head.count)
        if not head.count(separator):
            separator = r"\s+" if " " in head.strip() else ","
        german = separator == ";" and re.search(r"\d,\d", first) and not re.search(r"\d\.\d", first)
        return pandas.read_csv(path, sep=separator, decimal="," if german else ".")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from None


def _json_frame(path: Path) -> Any:
    import pandas

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
            rows = found.get("log_history") if isinstance(found, dict) else found
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected rows of metrics, or a trainer's state with log_history")
    return pandas.DataFrame(rows)


def _text_frame(path: Path) -> Any:
    """Parse lines such as "iteration 10/ 100 | consumed samples: 40 | lm loss: 9.1E+00 |"."""
    import pandas

    rows = []
    number = r"[-+]?(?:\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?|nan|inf)"
    part = re.compile(
        rf"(?:^|[\]\s])([A-Za-z][A-Za-z_ /-]*?)\s*:?\s+({number})([KMBGT]?)(?=[\s/]|$)"
    )
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if "iteration" not in line or "|" not in line:
                continue
            found = [part.search(piece) for piece in line.split("|")]
            row = {m[1].strip(): float(m[2].replace(",", "")) * _SUFFIXES[m[3]] for m in found if m}
            if len(row) > 1:
                rows.append(row)
    if not rows:
        raise UserError(
            f"{path}: expected a run directory, {READ}, which has lines such as 'iteration 10/ "
            "100 | ... | lm loss: 9.1E+00 |'"
        )
    return pandas.DataFrame(rows)


def _of_frame(path: Path, frame: Any, columns: Mapping[str, str] | None) -> list[Log]:
    names = {str(c): c for c in frame.columns}
    given = dict(columns or {})
    step = find_column("step", names, given)
    in_tokens = step is None and "step" not in given
    if in_tokens:
        step = find_column("tokens", names, given)
    if step is None:
        raise missing_column(path, "step", names, given.get("step"))
    # A column named both ways counts tokens.
    in_tokens = in_tokens or (step == given.get("tokens")) or is_known("tokens", step)
    numbers = _Numbers(path, frame, names, step)
    runs = _wandb_runs(names, given)
    if runs:
        return [
            _log(numbers, run, path.with_suffix("") / run, found, in_tokens)
            for run, found in runs.items()
        ]
    found = {what: find_column(what, names, given) for what in ("loss", "lr", "tokens", "samples")}
    parts = _TENSORBOARD.fullmatch(path.stem)
    if parts and "Wall time" in names:
        return [_tensorboard_file(numbers, path, parts["run"], parts["tag"])]
    for what, name in given.items():
        if what in found and name not in names:
            raise missing_column(path, what, names, name)
    if found["loss"] is None:
        raise missing_column(path, "loss", names, None)
    names_column = find_column("name", names, given)
    if names_column is not None and frame[names[names_column]].nunique() > 1:
        return [
            _log(_Numbers(path, rows, names, step), str(run), path / str(run), found, in_tokens)
            for run, rows in frame.groupby(names[names_column], sort=False)
        ]
    name = path.stem
    if path.name == TRAINER_STATE:
        folder = path.absolute().parent
        name = (folder.parent if folder.name.startswith("checkpoint-") else folder).name
    return [_log(numbers, name, path.with_suffix(""), found, in_tokens)]


def _wandb_runs(names: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the columns of each run in wandb's export: "RUN - train/loss", with __MIN beside."""
    runs: dict[str, dict[str, Any]] = {}
    for name in names:
        run, dash, metric = name.rpartition(" - ")
        if not dash:
            continue
        for what in ("loss", "lr", "tokens"):
            wanted = metric == given[what] if what in given else is_known(what, metric)
            if wanted and what not in runs.setdefault(run, {}):
                runs[run][what] = name
    return {run: found for run, found in runs.items() if found}


class _Numbers:
    """The numbers of a table by column, as series over its steps."""

    def __init__(self, path: Path, frame: Any, names: Mapping[str, Any], step: str) -> None:
        self.path, self.names, self.step = path, names, step
        self.frame = frame[frame[names[step]].notna()]
        self.steps = self._column(step)
        if np.isnan(self.steps).any():
            raise UserError(f"{path}: column '{step}' holds values that are not numbers")

    def _column(self, name: str) -> Array:
        import pandas

        values = pandas.to_numeric(self.frame[self.names[name]], errors="coerce")
        column: Array = values.to_numpy(dtype=float)
        return column

    def series(self, name: str | None) -> Series | None:
        """Return the rows that have a value in this column, None for no column."""
        if name is None:
            return None
        values = self._column(name)
        kept = ~np.isnan(values)
        return Series(self.steps[kept], values[kept])


def _log(
    numbers: _Numbers, name: str, path: Path, found: Mapping[str, str | None], in_tokens: bool
) -> Log:
    clock_is = "tokens" if found.get("tokens") else "samples"
    clock = None if in_tokens else numbers.series(found.get(clock_is))
    loss, lr = numbers.series(found.get("loss")), numbers.series(found.get("lr"))
    sizes = numbers.series(find_column("parameters", numbers.names, None))
    size = float(sizes.value[0]) if sizes is not None and len(set(sizes.value)) == 1 else None
    return Log(name, str(numbers.path), path, loss, lr, clock, clock_is, in_tokens, size)


def _tensorboard_file(numbers: _Numbers, path: Path, run: str, tag: str) -> Log:
    values, log = numbers.series("Value"), Log(run, str(path), path.with_name(run), None)
    if is_known_tag("lr", tag):
        log.lr = values
    elif is_known_tag("tokens", tag):
        log.clock = values
    else:
        log.loss = values
    return log


def joined(logs: list[Log]) -> list[Log]:
    """Put learning rates and tokens that lie in files of their own to the losses of their run."""
    whole = [log for log in logs if log.loss is not None]
    for part in logs:
        if part.loss is not None:
            continue
        owners = [log for log in whole if log.name == part.name]
        for log in owners:
            log.lr = log.lr or part.lr
            log.clock = log.clock or part.clock
        if not owners:
            raise UserError(f"{part.where}: no column is known as the loss of {part.name}")
    return whole


def _event_files(events: list[Path]) -> list[Path]:
    """Return a file of each folder: reading one reads them all."""
    return list({event.parent: event for event in events}.values())


def _events(path: Path, folder: Path, columns: Mapping[str, str] | None) -> Log:
    try:
        from tensorboard.backend.event_processing import event_accumulator
    except ImportError:
        raise UserError(
            f"{path}: reading TensorBoard events needs tensorboard: pip install tensorboard"
        ) from None
    events: Any = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = list(events.Tags()["scalars"])
    found: dict[str, Series] = {}
    for what in ("loss", "lr", "tokens", "samples"):
        tag = find_column(what, tags, columns)
        if tag is None and (what == "loss" or what in (columns or {})):
            raise missing_column(path, what, tags, (columns or {}).get(what))
        if tag is not None:
            rows = events.Scalars(tag)
            steps, values = [e.step for e in rows], [e.value for e in rows]
            found[what] = Series(np.array(steps, dtype=float), np.array(values, dtype=float))
    clock_is = "tokens" if "tokens" in found else "samples"
    return Log(
        *(folder.name, str(folder), folder, found["loss"], found.get("lr")),
        *(found.get(clock_is), clock_is),
    )
