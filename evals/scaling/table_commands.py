"""The commands ``python -m evals scaling downstream | loss-to-loss | hyperparameters``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from evals.scaling.arguments import columns_of, out_option
from evals.scaling.curves import Points
from evals.scaling.downstream import Downstream, fit_downstream, sigmoid
from evals.scaling.extrapolating import beyond
from evals.scaling.figures import save
from evals.scaling.fitting import fit
from evals.scaling.hyperparameters import PowerFit, fit_powers, optima_of
from evals.scaling.intervals import bootstrap
from evals.scaling.loss_to_loss import Pairs, loss_to_loss_law
from evals.scaling.outputs import written
from evals.scaling.parameters import Array
from evals.scaling.point_intervals import outside, point_interval, ranges_of
from evals.scaling.run_tables import RunTable, all_finite
from evals.scaling.tables import show_fit
from pretrain.common.errors import UserError
from pretrain.common.screen import plain_console, readable, show_table, titled_table

Indices = NDArray[np.int64]


def downstream_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``downstream``."""
    _table_options(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="columns TASK_bpb (loss) and TASK_acc (accuracy), or TASK=LOSS_COLUMN:ACCURACY_COLUMN",
    )
    parser.add_argument(
        "--chance", type=float, help="accuracy of guessing, where known (else fitted)"
    )
    parser.add_argument("--test", type=Path, help="a table of runs to predict")
    parser.add_argument(
        "--hold-out-largest",
        action="store_true",
        help="predict the runs of the largest size from the others",
    )
    parser.add_argument("--parameters", type=float, help="N of a planned run")
    parser.add_argument("--tokens", type=float, help="D of a planned run")


def loss_to_loss_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``loss-to-loss``."""
    _table_options(parser)
    parser.add_argument("--from", dest="source", required=True, metavar="COLUMN", help="first loss")
    parser.add_argument("--to", required=True, metavar="COLUMN", help="the loss to predict")
    parser.add_argument("--at", type=float, nargs="+", default=[], help="first losses to translate")
    parser.add_argument(
        "--hold-out-largest",
        action="store_true",
        help="predict the runs of the largest size from the others",
    )


def hyperparameter_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hyperparameters``."""
    _table_options(parser, samples=False)
    parser.add_argument("--parameters", type=float, help="N of a planned run")
    parser.add_argument("--tokens", type=float, help="D of a planned run")


def _table_options(parser: argparse.ArgumentParser, samples: bool = True) -> None:
    parser.add_argument("table", type=Path, help="a .csv, .tsv or .parquet with a row per run")
    parser.add_argument("--columns", nargs="+", metavar="WHAT=NAME", default=[])
    if samples:
        parser.add_argument("--bootstrap", type=int, default=200, metavar="SAMPLES")
        parser.add_argument("--seed", type=int, default=0)
    out_option(parser)


def _planned(given: argparse.Namespace) -> Points | None:
    if given.parameters is None and given.tokens is None:
        return None
    if given.parameters is None or given.tokens is None:
        missing = "--parameters" if given.parameters is None else "--tokens"
        raise UserError(f"a planned run needs both --parameters and --tokens; {missing} is missing")
    return Points(
        np.array([given.parameters]), np.array([given.tokens]), np.ones(1), names=["planned"]
    )


def _split(table: RunTable, largest: bool) -> tuple[Indices, Indices]:
    """Return the indices of the runs to fit, and of those of the largest size to predict."""
    every = np.arange(len(table.frame))
    if not largest:
        return every, every[:0]
    sizes = table.numbers("parameters")
    held = sizes == sizes.max()
    if held.all():
        raise UserError(
            f"{table.path}: all runs have one size, so that none are left to predict the largest "
            "from"
        )
    return every[~held], every[held]


def downstream(given: argparse.Namespace) -> int:
    """Fit the two-step law of each task, and predict accuracies."""
    console, columns = plain_console(), columns_of(given.columns)
    if given.chance is not None and not 0 <= given.chance < 1:
        raise UserError(f"--chance is {given.chance}, expected 0 or more and below 1")
    if given.bootstrap < 2:
        raise UserError(f"--bootstrap is {given.bootstrap}, expected at least 2 samples")
    table = RunTable(given.table, columns)
    fitted, held = _split(table, given.hold_out_largest)
    planned = _planned(given)
    saved, laws = list[dict[str, Any]](), list[tuple[Downstream, Points, Array]]()
    for word in given.tasks:
        task, loss, accuracy = _task(word)
        all_finite(table, [loss, accuracy])
        points, scores = table.points(loss), table.numbers(accuracy)
        law = fit_downstream(
            task, points.only(fitted), scores[fitted], given.chance, given.bootstrap, given.seed
        )
        laws.append((law, points.only(fitted), scores[fitted]))
        asked: list[tuple[Points, Array | None]] = []
        if len(held):
            asked.append((points.only(held), scores[held]))
        if given.test is not None:
            other = RunTable(given.test, columns)
            all_finite(other, [loss, accuracy])
            asked.append((other.points(loss), other.numbers(accuracy)))
        if planned is not None:
            asked.append((planned, None))
        ranges = ranges_of(*(x[fitted] for x in (points.parameters, points.tokens)))
        saved.append(law.to_json() | {"predicted": _show_scores(law, asked, ranges, console)})
    return written(given.out, "downstream", {"tasks": saved}, lambda to: _draw_tasks(laws, to))


def _task(word: str) -> tuple[str, str, str]:
    task, equals, columns = word.partition("=")
    if not equals:
        return task, f"{task}_bpb", f"{task}_acc"
    loss, colon, accuracy = columns.partition(":")
    if not (task and loss and colon and accuracy):
        raise UserError(
            f"--tasks holds '{word}', expected TASK or TASK=LOSS_COLUMN:ACCURACY_COLUMN"
        )
    return task, loss, accuracy


def _show_scores(
    law: Downstream,
    asked: list[tuple[Points, Array | None]],
    ranges: dict[str, Any],
    console: Console,
) -> list[dict[str, Any]]:
    low, high, slope, middle = law.values
    console.print(
        f"{law.task}: accuracy = {low:.3f} + {high - low:.3f} / (1 + exp({slope:.3g} (loss - "
        f"{middle:.4g}))), runs within {law.spread:.4f}"
    )
    found = list[dict[str, Any]]()
    if not asked:
        return found
    columns = ["run", "parameters", "tokens", "loss", "accuracy", "95 % interval", "logged"]
    far = [outside(ranges, points) for points, _ in asked]
    if any(map(any, far)):
        columns.append("extrapolates")
    table = titled_table(law.task, *columns, left=("extrapolates",))
    inside = count = 0
    for (points, scores), beyond_fitted in zip(asked, far, strict=True):
        loss, accuracy = law.predict(points)
        below, above = law.interval(points)
        for i, name in enumerate(points.names):
            seen = None if scores is None else float(scores[i])
            table.add_row(
                name,
                readable(points.parameters[i], 4),
                readable(points.tokens[i], 4),
                f"{loss[i]:.4f}",
                f"{accuracy[i]:.4f}",
                f"{below[i]:.4f} to {above[i]:.4f}",
                "" if seen is None else f"{seen:.4f}",
                *((beyond_fitted[i],) if "extrapolates" in columns else ()),
            )
            if seen is not None:
                inside, count = inside + (below[i] <= seen <= above[i]), count + 1
            found.append(
                {
                    "run": name,
                    "loss": float(loss[i]),
                    "accuracy": float(accuracy[i]),
                    "interval_95": [float(below[i]), float(above[i])],
                    "logged": seen,
                    "extrapolates": beyond_fitted[i],
                }
            )
    show_table(table, console)
    if count:
        console.print(f"{inside} of {count} runs inside their intervals")
    return found


def _draw_tasks(laws: list[tuple[Downstream, Points, Array]], path: Path) -> Path:
    figure = Figure(figsize=(5 * min(len(laws), 3), 4 * -(-len(laws) // 3)), layout="constrained")
    for i, (law, points, scores) in enumerate(laws):
        axes = figure.add_subplot(-(-len(laws) // 3), min(len(laws), 3), i + 1)
        axes.plot(points.loss, scores, "o", markersize=4)
        grid = np.linspace(law.losses[0] * 0.8, law.losses[1], 200)
        axes.plot(grid, sigmoid(law.values, grid))
        axes.set(title=law.task, xlabel="loss on the right answers", ylabel="accuracy")
        axes.title.set_fontsize(8)
    return save(figure, path)


def loss_to_loss(given: argparse.Namespace) -> int:
    """Fit the law from one loss to another, and translate losses."""
    console, table = plain_console(), RunTable(given.table, columns_of(given.columns))
    all_finite(table, [table.known(given.source), table.known(given.to)])
    source, target = table.numbers(given.source), table.numbers(given.to)
    fitted, held = _split(table, given.hold_out_largest)
    pairs = Pairs(source[fitted], target[fitted], [table.names[i] for i in fitted], table.path.name)
    found = fit(loss_to_loss_law(pairs), [pairs])
    bad = [x for x in given.at if not 0 < x < np.inf]
    if bad:
        raise UserError(f"--at holds {bad[0]:g}, expected losses above 0")
    if given.bootstrap < 2:
        raise UserError(f"--bootstrap is {given.bootstrap}, expected at least 2 samples")
    bootstrap(found, [pairs], given.bootstrap, given.seed)
    show_fit(found, console)
    asked = np.append(source[held], given.at)
    names = [table.names[i] for i in held] + ["asked"] * len(given.at)
    seen = [*target[held], *[None] * len(given.at)]
    saved = list[dict[str, Any]]()
    if len(asked):
        columns = (given.source, given.to, "95 % interval", "logged")
        shown = titled_table(f"{given.source} to {given.to}", "run", *columns)
        at, ends = Pairs(asked, np.ones(len(asked))), [pairs.source.min(), pairs.source.max()]
        low, high = point_interval(found, at)
        for name, x, y, a, b, logged in zip(
            names, asked, found.predict(at), low, high, seen, strict=True
        ):
            told = "" if logged is None else f"{logged:.4f}"
            shown.add_row(name, f"{x:.4f}", f"{y:.4f}", f"{a:.4f} to {b:.4f}", told)
            saved.append({"run": name, "from": float(x), "to": float(y), "interval": [a, b]})
            saved[-1]["extrapolates"] = beyond(x, ends, given.source)
        show_table(shown, console)
        for row in saved:
            if row["extrapolates"]:
                console.print(f"{row['run']} extrapolates: {row['extrapolates']}", style="yellow")

    def draw(path: Path) -> Path:
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.subplots()
        axes.plot(pairs.source, pairs.loss, "o", markersize=4)
        grid = np.linspace(0.9 * pairs.source.min(), pairs.source.max(), 200)
        axes.plot(grid, found.predict(Pairs(grid, np.ones(200))))
        axes.set(xlabel=given.source, ylabel=given.to, title=found.law.title)
        return save(figure, path)

    return written(given.out, "loss_to_loss", found.to_json() | {"translated": saved}, draw)


def hyperparameters(given: argparse.Namespace) -> int:
    """Fit the optimal learning rate and batch size, and give them for a planned run."""
    console, table = plain_console(), RunTable(given.table, columns_of(given.columns))
    what = ("parameters", "tokens", "lr", "batch", "loss")
    all_finite(table, what)
    columns = [table.numbers(w) for w in what]
    for name, values in zip(what, columns, strict=True):
        if (values <= 0).any():
            raise UserError(f"{table.path}: {name} holds {values.min():g}, expected above 0")
    optima = optima_of(*columns)
    fits = fit_powers(optima)
    shown = titled_table("optima", "parameters", "tokens", "lr", "batch (tokens)", "from")
    for i, how in enumerate(optima.how):
        shown.add_row(
            readable(optima.parameters[i], 4),
            readable(optima.tokens[i], 4),
            *(
                readable(x[i], 4) if np.isfinite(x[i]) else "not enclosed"
                for x in (optima.lr, optima.batch)
            ),
            how,
        )
    show_table(shown, console)
    for found in fits:
        console.print(_sentence(found))
    saved: dict[str, Any] = {"fits": [f.to_json() for f in fits]}
    planned = _planned(given)
    if planned is not None:
        n, d = float(planned.parameters[0]), float(planned.tokens[0])
        shown = titled_table(f"{n:.4g} parameters, {d:.4g} tokens", "", "best", "95 % interval")
        for found in fits:
            best, low, high = found.at(n, d)
            shown.add_row(found.name, readable(best), f"{readable(low)} to {readable(high)}")
            saved[found.name] = {"best": best, "interval_95": [low, high]}
        show_table(shown, console)
        (saved["extrapolates"],) = outside(ranges_of(optima.parameters, optima.tokens), planned)
        if saved["extrapolates"]:
            told = f"extrapolates from the fitted runs: {saved['extrapolates']}"
            console.print(told, style="yellow")

    def draw(path: Path) -> Path:
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, found in zip(figure.subplots(1, len(fits)), fits, strict=True):
            values = getattr(optima, found.name)
            points = zip(optima.parameters, optima.tokens, strict=True)
            axes.loglog(values, [found.at(n, d)[0] for n, d in points], "o")
            ends = [np.nanmin(values), np.nanmax(values)]
            axes.loglog(ends, ends, color="black", linewidth=0.6)
            axes.set(xlabel=f"best {found.name}", ylabel=f"{found.name} of the law")
        return save(figure, path)

    return written(given.out, "hyperparameters", saved, draw)


def _sentence(found: PowerFit) -> str:
    saved = found.to_json()["exponents"]
    words = [f"{found.name} = {readable(float(np.exp(saved['constant']['value'])))}"]
    for variable in found.variables:
        low, high = saved[variable]["interval_95"]
        words.append(f"{variable}^{saved[variable]['value']:.3f} ({low:.3f} to {high:.3f})")
    return f"{' '.join(words)}, optima within {100 * found.spread:.0f} %"
