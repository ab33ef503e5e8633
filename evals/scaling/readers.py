"""Read loss curves: run directories, tables, exports and logs of other programs, manifests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals.scaling.branches import join_branches
from evals.scaling.building import Built, build, counts_tokens, token_unit
from evals.scaling.curves import Curve
from evals.scaling.logs import Log, Series, joined, read_logs
from evals.scaling.manifest import Source, sources_of
from evals.scaling.parameters import Array
from evals.scaling.points_tables import is_points_table, read_points
from evals.scaling.reading import Reading
from evals.scaling.schedules import run_lr, tokens_of_steps, tokens_per_step
from pretrain.common.config_loader import flattened
from pretrain.common.errors import UserError
from pretrain.run_arguments import distinct_names, expand_paths, runs_of
from pretrain.run_directory import RunDirectory

MANY = 5000
__all__ = ["Reading", "is_points_table", "read_curves", "read_points"]


@dataclass
class _Found:
    """A log, its source's options, and the run of this project that it is of, if any."""

    log: Log
    source: Source
    run: RunDirectory | None = None


def read_curves(
    sources: Sequence[str | Path], reading: Reading | None = None, known: Sequence[Curve] = ()
) -> tuple[list[Curve], list[str]]:
    """Read all curves of ``sources`` that can be fitted, and a sentence for each skipped one.

    known: curves read before, which new ones may branch off. Raises UserError for a source that
    cannot be read, and where no curve remains.
    """
    reading, skipped = reading or Reading(), list[str]()
    found = _logs(sources, reading, skipped)
    _name(found)
    readings = [one.source.reading.of(one.log.name) for one in found]
    unsized = [
        one.log
        for one, own in zip(found, readings, strict=True)
        if own.tokens_per_step is None and counts_tokens(one.log)
    ]
    unit = reading.axis_unit or 1.0
    if unsized and reading.axis_unit is None:
        units = [c.tokens_per_step for c in known if c.tokens_per_step is not None]
        unit = units[0] if units else token_unit(unsized)
    built = list[Built]()
    for one, own in zip(found, readings, strict=True):
        if one.run is None:
            built.append(build(one.log, own, unit))
            continue
        config = one.run.read_config()
        lr, tokens = run_lr(config, one.run), tokens_of_steps(config.plan)
        built.append(build(one.log, own, unit, lr, tokens))
        _describe(built[-1].curve, one.run, own.embeddings)
    trunks = {b.curve.name: own.branch_of for b, own in zip(built, readings, strict=True)}
    join_branches(built, trunks, known)
    curves = [b.curve for b in built]
    if not reading.keep_diverged:
        reasons = [diverged(curve) for curve in curves]
        skipped += [f"{c.name} is skipped: {r}" for c, r in zip(curves, reasons, strict=True) if r]
        curves = [c for c, reason in zip(curves, reasons, strict=True) if not reason]
    if not curves:
        raise UserError(f"there is no curve to fit; {'; '.join(skipped) or 'none was given'}")
    return curves, skipped


def _logs(sources: Sequence[str | Path], reading: Reading, skipped: list[str]) -> list[_Found]:
    """Read the logs of all sources, runs of this project last."""
    found, runs = list[_Found](), dict[Path, tuple[RunDirectory, Source]]()
    for source in [s for path in expand_paths(sources) for s in sources_of(path, reading)]:
        path = source.path
        below = runs_of(path) if path.is_dir() else []  # before events, which runs may have as well
        runs.update((run.path.resolve(), (run, source)) for run in below)
        if not below and RunDirectory(path).config_file.exists():
            skipped.append(f"{path} is skipped: it has logged nothing yet")
        elif not below:
            logs = read_logs(path, source.reading.columns)
            if source.run is not None:
                names = [log.name for log in logs]
                logs = [log for log in logs if log.name == source.run]
                if not logs:
                    raise UserError(
                        f"{path}: has no run '{source.run}', expected one of {', '.join(names)}"
                    )
            if source.name is not None:
                if len(logs) > 1:
                    raise UserError(
                        f"{path}: holds {len(logs)} runs, but is named '{source.name}': name one "
                        f"of them as run, such as {logs[0].name}"
                    )
                logs[0].name = source.name
            found += [_Found(log, source) for log in logs]
    whole = joined([one.log for one in found])
    found = [one for one in found if any(one.log is log for log in whole)]
    names = distinct_names([run.path for run, _ in runs.values()])
    for (run, source), name in zip(runs.values(), names, strict=True):
        log = _run(run, source.name or name, source.reading)
        if log is None:
            skipped.append(f"{name} is skipped: it has logged no loss yet")
        else:
            found.append(_Found(log, source, run))
    return found


def _name(found: Sequence[_Found]) -> None:
    """Tell logs of one name apart by their folders; raises UserError where nothing does."""
    names = [one.log.name for one in found]
    alike = [one for one in found if names.count(one.log.name) > 1 and one.source.name is None]
    longer = distinct_names([one.log.path for one in alike])
    for one, name in zip(alike, longer, strict=True):
        one.log.name = name
    names = [one.log.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two curves have the name {name}: expected different names")


def _run(run: RunDirectory, name: str, reading: Reading) -> Log | None:
    """Read the log of a run of this project; None where no loss is logged."""
    key = (reading.columns or {}).get("loss", "loss")
    every = run.read_metrics()
    rows = [r for r in every if isinstance(r.get(key, ""), int | float | None)]
    if not rows:
        if key == "loss" or not any("loss" in r for r in every):
            return None
        raise UserError(f"{run.metrics_file} has no '{key}'")
    step = np.array([float(r["step"]) for r in rows])
    loss = np.array([math.nan if r[key] is None else float(r[key]) for r in rows])
    lr = np.array([float(r.get("lr") or math.nan) for r in rows])
    kept = np.isfinite(lr)
    rates = Series(step[kept], lr[kept]) if kept.any() else None
    return Log(name, str(run.metrics_file), run.path, Series(step, loss), rates)


def _describe(curve: Curve, run: RunDirectory, embeddings: bool) -> None:
    """Add what a run of this project says of itself, but for what is given."""
    config, found = run.read_config(), run.read_model()
    if found:
        apart = 0 if embeddings else found["embedding_parameters"]
        curve.parameters = curve.parameters or float(found["parameters"] - apart)
        curve.flops_per_token = float(found["training_flops_per_token"])
    curve.tokens_per_step = curve.tokens_per_step or tokens_per_step(config.plan)
    curve.labels |= flattened(dataclasses.asdict(config))


def diverged(curve: Curve) -> str | None:
    """Return why a curve counts as diverged, or None."""
    if "diverged" in curve.labels:
        return str(curve.labels["diverged"])
    window = max(3, len(curve.loss) // 20)
    if len(curve.loss) < 3 * window:
        return None
    medians = _medians(curve.loss, window)
    rise = medians[-1] - medians.min()
    if rise > max(0.25, 0.05 * medians.min()):
        return f"it diverged: its loss ends {rise:.2f} nats above its lowest, {medians.min():.3f}"
    return None


def _medians(loss: Array, window: int) -> Array:
    """Return the median of every ``window`` neighbors."""
    if len(loss) > MANY:  # all windows at once would need memory quadratic in the losses
        import pandas

        return pandas.Series(loss).rolling(window).median().to_numpy()[window - 1 :]
    medians: Array = np.median(np.lib.stride_tricks.sliding_window_view(loss, window), axis=1)
    return medians
