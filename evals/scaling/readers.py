"""Read loss curves: run directories, CSV and Parquet files, wandb exports, TensorBoard events."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.scaling.curves import Curve, Points, end_of_warmup
from evals.scaling.parameters import Array
from evals.scaling.schedules import (
    MOST_STEPS,
    interpolated_lr,
    largest_difference,
    parse_schedule,
    run_lr,
    schedule_lr,
)
from pretrain.common.config_loader import flattened
from pretrain.common.errors import UserError
from pretrain.run_arguments import distinct_names, expand_paths, runs_of
from pretrain.run_directory import METRICS_FILE, RunDirectory

# Common names of the columns; the first one found is used.
KNOWN = {
    "step": ("step", "_step", "Step", "global_step", "iteration", "iterations", "iter"),
    "lr": ("lr", "learning_rate", "train/lr", "train/learning_rate", "learning-rate", "optim/lr"),
    "loss": ("loss", "train/loss", "train_loss", "training_loss", "lm loss", "lm_loss"),
}
MISMATCH = 1e-3


@dataclass
class Reading:
    """Options for what a file does not say.

    columns: names of step, lr, loss; schedule: as :func:`parse_schedule` takes it, or one for each
    curve by name; from_step: earlier losses are skipped (None: those of the warm-up); smooth:
    factor of an exponential mean, 0 = off; embeddings: whether N counts them.
    """

    columns: dict[str, str] | None = None
    schedule: str | dict[str, str] | None = None
    warmup_steps: int | None = None
    parameters: float | None = None
    tokens_per_step: float | None = None
    from_step: int | None = None
    smooth: float = 0.0
    embeddings: bool = True
    keep_diverged: bool = False


def read_curves(
    sources: Sequence[str | Path], reading: Reading | None = None
) -> tuple[list[Curve], list[str]]:
    """Read all curves of ``sources`` that can be fitted, and a sentence for each skipped one.

    Raises UserError for a source that cannot be read, and where no curve remains.
    """
    reading, curves, skipped = reading or Reading(), list[Curve](), list[str]()
    runs = dict[Path, RunDirectory]()
    for path in expand_paths(sources):
        found = runs_of(path) if path.is_dir() else []  # before events, which runs may have as well
        runs.update((run.path.resolve(), run) for run in found)
        if not found and RunDirectory(path).config_file.exists():
            skipped.append(f"{path} is skipped: it has logged nothing yet")
        elif not found:
            curves += _read(path, reading)
    names = distinct_names([run.path for run in runs.values()])
    for run, name in zip(runs.values(), names, strict=True):
        curve = _run(run, name, reading)
        if curve is None:
            skipped.append(f"{name} is skipped: it has logged no loss yet")
        else:
            curves.append(curve)
    if not reading.keep_diverged:
        reasons = [diverged(curve) for curve in curves]
        skipped += [f"{c.name} is skipped: {r}" for c, r in zip(curves, reasons, strict=True) if r]
        curves = [c for c, reason in zip(curves, reasons, strict=True) if not reason]
    if not curves:
        raise UserError(f"there is no curve to fit; {'; '.join(skipped) or 'none was given'}")
    names = [c.name for c in curves]
    for curve, source in zip(curves, names, strict=True):
        if names.count(source) > 1:
            raise UserError(f"two curves have the name {curve.name}: expected different names")
    return curves, skipped


def _read(path: Path, reading: Reading) -> list[Curve]:
    if path.is_dir():
        if any(path.rglob("events.out.tfevents.*")):
            return [_curve(path.name, _events(path, reading), reading)]
        files = [p for p in sorted(path.iterdir()) if p.suffix in (".csv", ".parquet")]
        if files:
            return [curve for file in files for curve in _read(file, reading)]
        raise UserError(f"{path}: holds no {METRICS_FILE}, CSV, Parquet or TensorBoard event file")
    if path.suffix in (".csv", ".parquet"):
        return [_curve(name, t, reading) for name, t in _tables(path, reading)]
    if path.name.startswith("events.out.tfevents."):
        return [_curve(path.parent.name, _events(path, reading), reading)]
    raise UserError(f"{path}: expected a run directory, .csv, .parquet or TensorBoard events")


@dataclass
class _Table:
    where: str
    step: NDArray[Any]
    loss: Array
    lr: Array | None

    def __post_init__(self) -> None:
        step = self.step.astype(float)
        wrong = ~((step >= 0) & (step <= MOST_STEPS) & (step == np.floor(step)))
        if wrong.any():
            raise UserError(
                f"{self.where}: a step is {step[wrong][0]:.16g}, expected whole numbers from 0 to "
                f"{MOST_STEPS:,}"
            )
        self.step = step.astype(np.int64)


def _run(run: RunDirectory, name: str, reading: Reading) -> Curve | None:
    """Read a run of this project, with the schedule of its config; None where no loss is logged."""
    key = (reading.columns or {}).get("loss", "loss")
    every = run.read_metrics()
    rows = [r for r in every if isinstance(r.get(key, ""), int | float | None)]
    if not rows:
        if key == "loss" or not any("loss" in r for r in every):
            return None
        raise UserError(f"{run.metrics_file} has no '{key}'")
    table = _Table(
        str(run.metrics_file),
        np.array([r["step"] for r in rows]),
        np.array([math.nan if r[key] is None else float(r[key]) for r in rows]),
        np.array([float(r.get("lr") or math.nan) for r in rows]),
    )
    config = run.read_config()
    lr = run_lr(config, run)
    curve = _curve(name, table, reading, lr)
    found = run.read_model()
    if found:
        apart = 0 if reading.embeddings else found["embedding_parameters"]
        curve.parameters = reading.parameters or float(found["parameters"] - apart)
        curve.flops_per_token = float(found["training_flops_per_token"])
    curve.tokens_per_step = reading.tokens_per_step or float(config.train.global_batch_tokens)
    curve.labels = flattened(dataclasses.asdict(config))
    return curve


def _tables(path: Path, reading: Reading) -> list[tuple[str, _Table]]:
    import pandas

    try:
        frame = pandas.read_csv(path) if path.suffix == ".csv" else pandas.read_parquet(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from None
    names = {str(c): c for c in frame.columns}
    step = _column(path, names, "step", reading)
    assert step is not None
    # wandb's own export has a column per run: "RUN - train/loss", with __MIN and __MAX beside it.
    given = (reading.columns or {}).get("loss")
    per_run = {
        run: name
        for name in names
        for run, dash, metric in [name.rpartition(" - ")]
        if dash and metric in ((given,) if given else KNOWN["loss"])
    }
    if per_run:
        rates = {
            run: f"{run} - {m}" for run in per_run for m in KNOWN["lr"] if f"{run} - {m}" in names
        }
        return [
            (run, _table(path, frame, step, name, rates.get(run))) for run, name in per_run.items()
        ]
    loss = _column(path, names, "loss", reading)
    assert loss is not None
    return [(path.stem, _table(path, frame, step, loss, _column(path, names, "lr", reading)))]


def _column(path: Path, names: dict[str, Any], what: str, reading: Reading) -> str | None:
    given = (reading.columns or {}).get(what)
    if given is not None:
        if given not in names:
            raise UserError(f"{path}: has no column '{given}', found: {', '.join(names)}")
        return given
    for name in KNOWN[what]:
        if name in names:
            return name
    if what == "lr":
        return None
    raise UserError(
        f"{path}: no column is known as the {what}, found: {', '.join(names)}; name it with "
        f"--columns {what}=NAME"
    )


def _table(path: Path, frame: Any, step: str, loss: str, lr: str | None) -> _Table:
    import pandas

    rows = frame[frame[step].notna()]
    numbers = {c: pandas.to_numeric(rows[c], errors="coerce") for c in (step, loss, lr) if c}
    if numbers[step].isna().any():
        raise UserError(f"{path}: column '{step}' holds values that are not numbers")
    table = pandas.DataFrame(numbers)
    # A row may hold one value only: merge adjacent rows of the same step.
    table = table.groupby((table[step] != table[step].shift()).cumsum()).last()
    table = table[table[loss].notna()]
    kept = {c: table[c].to_numpy(dtype=float) for c in numbers}
    return _Table(str(path), kept[step], kept[loss], kept[lr] if lr else None)


def _events(path: Path, reading: Reading) -> _Table:
    try:
        from tensorboard.backend.event_processing import event_accumulator
    except ImportError:
        raise UserError(
            f"{path}: reading TensorBoard events needs tensorboard: pip install tensorboard"
        ) from None
    events: Any = event_accumulator.EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    tags = {t: t for t in events.Tags()["scalars"]}
    loss = _column(path, tags, "loss", Reading(reading.columns))
    lr = _column(path, tags, "lr", reading)
    assert loss is not None
    rows = events.Scalars(loss)
    rates = {e.step: e.value for e in events.Scalars(lr)} if lr else {}
    return _Table(
        str(path),
        np.array([e.step for e in rows]),
        np.array([e.value for e in rows]),
        np.array([rates.get(e.step, math.nan) for e in rows]) if rates else None,
    )


def _curve(name: str, table: _Table, reading: Reading, lr: Array | None = None) -> Curve:
    """Clean a table, and add a learning rate for every step."""
    warnings = list[str]()
    # After a resume steps are logged again: the last time counts.
    last = {int(s): i for i, s in enumerate(table.step)}
    if len(last) < len(table.step):
        again = len(table.step) - len(last)
        warnings.append(f"{again} steps were logged more than once, the last time counts")
    order = np.array([last[s] for s in sorted(last)], dtype=np.int64)
    step, loss = table.step[order], table.loss[order]
    logged = None if table.lr is None else table.lr[order]
    finite = np.isfinite(loss)
    if not finite.all():
        bad = step[~finite]
        warnings.append(
            f"{len(bad)} losses that are not finite (the first at step {bad[0]:,}) were skipped"
        )
    ends_bad = len(finite) and not finite[-max(1, len(finite) // 20) :].any()
    step, loss = step[finite], loss[finite]
    logged = None if logged is None else logged[finite]
    if not len(step):
        raise UserError(f"{table.where} has no finite loss")
    gaps = np.diff(step)
    if len(gaps) > 2 and gaps.max() > 5 * np.median(gaps):
        at = int(np.argmax(gaps))
        warnings.append(f"nothing is logged between steps {step[at]:,} and {step[at + 1]:,}")
    given = reading.schedule
    if isinstance(given, dict):
        given = given.get(name)
    if given is not None:
        config, peak, steps = parse_schedule(given)
        lr = schedule_lr(config, peak, max(steps, int(step[-1])))
    known = None if logged is None else np.isfinite(logged)
    if lr is not None and logged is not None and known is not None and known.any():
        if len(lr) < step[-1]:  # the run was continued with other settings
            raise UserError(
                f"{table.where}: the loss is logged up to step {step[-1]:,}, but the schedule ends "
                f"at {len(lr):,}"
            )
        difference, at = largest_difference(lr, step[known], logged[known])
        if difference > MISMATCH:
            warnings.append(
                f"the logged learning rate differs from the schedule's by up to "
                f"{100 * difference:.2g} % of the peak, at step {at:,}"
            )
    elif lr is None:
        if logged is None or known is None or not known.any():
            raise UserError(
                f"{table.where}: no learning rate is logged; give the schedule, such as --schedule "
                '"kind=cosine lr=3e-4 steps=24000 warmup_steps=2000"'
            )
        lr, notes = interpolated_lr(step[known], logged[known], reading.warmup_steps)
        if len(lr) <= step[-1]:
            lr = np.append(lr, np.full(int(step[-1]) + 1 - len(lr), lr[-1]))
        warnings += notes
    if lr.max() <= 0:
        raise UserError(f"{table.where}: the learning rate is never above 0")
    warmup = end_of_warmup(lr) if reading.warmup_steps is None else reading.warmup_steps
    begin = reading.from_step if reading.from_step is not None else max(warmup, 1)
    kept = step >= max(begin, 1)
    if not kept.any():
        raise UserError(
            f"{table.where}: no loss is logged from step {begin:,} on, the last is at "
            f"{step[-1]:,}; choose an earlier --from-step"
        )
    step, loss = step[kept], loss[kept]
    if reading.smooth:
        loss = _smoothed(loss, reading.smooth)
        warnings.append(f"the loss is an exponential mean with factor {reading.smooth}")
    curve = Curve(
        name, step, loss, lr, warmup, reading.parameters, reading.tokens_per_step, warnings=warnings
    )
    if ends_bad:
        curve.labels["diverged"] = "its last losses are not finite"
    return curve


def diverged(curve: Curve) -> str | None:
    """Return why a curve counts as diverged, or None."""
    if "diverged" in curve.labels:
        return str(curve.labels["diverged"])
    window = max(3, len(curve.loss) // 20)
    if len(curve.loss) < 3 * window:
        return None
    shape = np.lib.stride_tricks.sliding_window_view(curve.loss, window)
    medians = np.median(shape, axis=1)
    rise = medians[-1] - medians.min()
    if rise > max(0.25, 0.05 * medians.min()):
        return f"it diverged: its loss ends {rise:.2f} nats above its lowest, {medians.min():.3f}"
    return None


def _smoothed(loss: Array, factor: float) -> Array:
    result, mean = np.empty_like(loss), loss[0]
    for i, value in enumerate(loss):
        mean = factor * mean + (1 - factor) * value
        result[i] = mean
    return result


def read_points(path: Path, columns: dict[str, str] | None = None) -> Points:
    """Read a CSV or Parquet table with a row per run.

    Columns are parameters, tokens and loss, and optionally unique_tokens, flops and name;
    ``columns`` maps these to the table's names. Raises UserError for a table that cannot be read or
    lacks a column.
    """
    import pandas

    try:
        frame = pandas.read_csv(path) if path.suffix == ".csv" else pandas.read_parquet(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from None
    known = {
        "parameters": ("parameters", "params", "N", "n", "Model Size"),
        "tokens": ("tokens", "D", "d", "Training Tokens"),
        "loss": ("loss", "L", "final_loss"),
        "unique_tokens": ("unique_tokens", "U"),
        "flops": ("flops", "FLOPs", "C", "Training FLOP"),
        "name": ("name", "run"),
    }
    found = dict[str, Any]()
    for what, names in known.items():
        given = (columns or {}).get(what)
        if given is not None and given not in frame.columns:
            names_there = ", ".join(map(str, frame.columns))
            raise UserError(f"{path}: has no column '{given}', found: {names_there}")
        name = given or next((n for n in names if n in frame.columns), None)
        if name is not None:
            found[what] = frame[name]
    missing = [w for w in ("parameters", "tokens", "loss") if w not in found]
    if missing:
        raise UserError(
            f"{path}: no column is known as {missing[0]}, found: "
            f"{', '.join(map(str, frame.columns))}; name it with --columns {missing[0]}=NAME"
        )
    numbers = {
        w: pandas.to_numeric(v, errors="coerce").to_numpy(dtype=float)
        for w, v in found.items()
        if w != "name"
    }
    finite = np.isfinite(numbers["loss"])
    points = Points(
        numbers["parameters"][finite],
        numbers["tokens"][finite],
        numbers["loss"][finite],
        numbers["unique_tokens"][finite] if "unique_tokens" in numbers else None,
        numbers["flops"][finite] if "flops" in numbers else None,
        [str(x) for x in found["name"][finite]] if "name" in found else (),
        path.name,
    )
    if not finite.all():
        points.warnings.append(f"{int((~finite).sum())} runs without a finite loss were skipped")
    return points


def is_points_table(path: Path) -> bool:
    """Return whether a table has a row per run (parameters and tokens, no step)."""
    import pandas

    if path.suffix not in (".csv", ".parquet") or not path.exists():
        return False
    try:
        frame = (
            pandas.read_csv(path, nrows=1) if path.suffix == ".csv" else pandas.read_parquet(path)
        )
    except (ValueError, OSError):
        return False
    return not any(n in frame.columns for n in KNOWN["step"]) and any(
        n in frame.columns for n in ("tokens", "D", "d", "Training Tokens")
    )
