"""The commands ``python -m evals scaling fit | predict | plan | compare | ...``."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from evals.scaling.allocation import along_budget
from evals.scaling.arguments import (
    SCHEDULE,
    check_numbers,
    columns_of,
    compare_options,
    fit_options,
    options_of,
    plan_options,
    predict_options,
    reading_of,
)
from evals.scaling.choosing import choose_law, end_error
from evals.scaling.comparing import compare, fit_families
from evals.scaling.curves import Curve, Points, points_of
from evals.scaling.designing import cheapest_design
from evals.scaling.extrapolating import outside_of, refuse_undetermined
from evals.scaling.fitting import fit, load_fit
from evals.scaling.intervals import bootstrap, interval, mape
from evals.scaling.laws import CURVE_LAWS, LAWS, curve_law
from evals.scaling.merges import merge_options, show_merges
from evals.scaling.notes import grouped
from evals.scaling.outputs import written
from evals.scaling.planning import (
    best_schedules,
    best_size,
    best_size_and_schedule,
    planned_curve,
)
from evals.scaling.point_commands import fit_points, plan_points, predict_points
from evals.scaling.readers import Reading, is_points_table, read_curves, read_points
from evals.scaling.schedules import parse_schedule
from evals.scaling.size_laws import SIZE_LAWS, ChinchillaLaw, DataConstrainedLaw, ExpertsLaw
from evals.scaling.table_commands import (
    downstream,
    downstream_options,
    hyperparameter_options,
    hyperparameters,
    loss_to_loss,
    loss_to_loss_options,
)
from evals.scaling.tables import (
    errors_sentence,
    sentences,
    show_choice,
    show_fit,
    show_schedules,
    show_size,
    with_interval,
)
from pretrain.common.config_loader import nearest
from pretrain.common.errors import UserError
from pretrain.common.outputs import check_folder
from pretrain.common.screen import plain_console, show_table, titled_table
from pretrain.run_arguments import expand_paths


def main(arguments: Sequence[str]) -> int:
    """Run the command that ``arguments`` begin with."""
    parser = argparse.ArgumentParser(
        prog="python -m evals scaling", description="Fit and use scaling laws of logged runs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fit_options(commands.add_parser("fit", help="fit a law to loss curves, or to a table of runs"))
    predict_options(commands.add_parser("predict", help="predict the loss curve of a future run"))
    plan_options(commands.add_parser("plan", help="choose schedule, size, tokens and runs to fit"))
    compare_options(commands.add_parser("compare", help="find where families of runs cross"))
    downstream_options(
        commands.add_parser("downstream", help="predict accuracies, by way of a task's loss")
    )
    loss_to_loss_options(commands.add_parser("loss-to-loss", help="translate one loss to another"))
    hyperparameter_options(
        commands.add_parser("hyperparameters", help="fit the best learning rate and batch size")
    )
    merge_options(commands.add_parser("merges", help="compare merged checkpoints with a law"))
    given = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = {
        "fit": _fit,
        "predict": _predict,
        "plan": _plan,
        "compare": _compare,
        "downstream": downstream,
        "loss-to-loss": loss_to_loss,
        "hyperparameters": hyperparameters,
        "merges": show_merges,
    }[given.command]
    check_numbers(given)
    check_folder(given.out, "--out")
    return run(given)


def _fit(given: argparse.Namespace) -> int:
    console, sources = plain_console(), expand_paths(given.sources)
    if given.law is not None and given.law not in (*LAWS, "auto"):
        raise UserError(
            f"--law is '{given.law}'{nearest(given.law, list(LAWS))}, expected auto or one of "
            f"{', '.join(LAWS)}"
        )
    if len(sources) == 1 and is_points_table(sources[0], columns_of(given.columns)):
        return fit_points(given, read_points(sources[0], columns_of(given.columns)), console)
    reading = reading_of(given)
    curves, skipped = read_curves(sources, reading)
    for sentence in skipped:
        console.print(sentence, style="yellow")
    if given.law in SIZE_LAWS:
        return fit_points(given, points_of(curves), console)
    tests = read_curves(given.test, reading, curves)[0] if given.test else []
    reading.check_names()
    options = options_of(given, points=False)
    sizes = (given.sized, given.size_in_annealing, given.size_in_progress)
    name, choice = given.law or "auto", None
    if name == "auto":
        choice = choose_law(curves, sizes, options)
        name = choice.law
    law = curve_law(name, curves, *sizes)
    begun = time.perf_counter()
    found = fit(law, curves, options)
    seconds = time.perf_counter() - begun
    if given.bootstrap:
        bootstrap(found, curves, given.bootstrap, given.seed)
    saved = found.to_json()
    saved["seconds"] = seconds
    saved["choice"] = None if choice is None else dataclasses.asdict(choice)
    saved["test_mape"] = {c.name: mape(found, c) for c in tests}
    saved["test_end_error"] = {c.name: end_error(found, c) for c in tests}
    if choice is not None:
        show_choice(choice, console)
    show_fit(found, console)
    console.print(errors_sentence("fitted", found.mape(), found.end_errors()))
    if tests:
        console.print(errors_sentence("predicted", saved["test_mape"], saved["test_end_error"]))
    if found.error is not None:
        console.print(
            f"the law's own error: {100 * float(np.median(found.error.scales)):.2f} % where runs "
            f"were not fitted, after {found.error.held_out} held-out losses; intervals include it"
        )
    from evals.scaling.figures import draw_curves

    return written(given.out, "fit", saved, lambda to: draw_curves(found, curves, to, tests))


def _predict(given: argparse.Namespace) -> int:
    console, found = plain_console(), load_fit(given.fit)
    if found.law.name in SIZE_LAWS:
        return predict_points(given, found, console)
    if not given.schedule and not given.run:
        raise UserError(f"predict needs --schedule, such as {SCHEDULE}, or --run")
    curves, seen = list[Curve](), list[bool]()
    for text in given.schedule:
        schedule, peak, steps = parse_schedule(text)
        curves.append(
            planned_curve(
                schedule,
                peak,
                steps,
                points=400,
                parameters=given.parameters,
                name=f"{schedule.kind} {len(curves) + 1}"
                if len(given.schedule) > 1
                else schedule.kind,
            )
        )
        seen.append(False)
    if given.run:
        unit = found.domain.get("tokens_per_step")
        reading = Reading(parameters=given.parameters, axis_unit=unit)
        logged, skipped = read_curves(given.run, reading)
        curves += logged
        seen += [True] * len(logged)
        for note in skipped + grouped(f"{c.name}: {w}" for c in logged for w in c.warnings):
            console.print(note, style="yellow")
    table = titled_table(
        f"{found.law.title}: predicted",
        *("curve", "steps", "final loss (95 %)", "logged", "error: mean / end", "note"),
        left=("note",),
    )
    saved = []
    for curve, has_loss in zip(curves, seen, strict=True):
        refuse_undetermined(found, curve, curve.name)
        predicted = found.predict(curve)
        low, high = interval(found, curve) if found.samples is not None else (None, None)
        ends = None if low is None or high is None else (float(low[-1]), float(high[-1]))
        outside = outside_of(found, curve)
        table.add_row(
            curve.name,
            f"{curve.step[-1]:,}",
            with_interval(float(predicted[-1]), ends),
            f"{curve.loss[-1]:.4f}" if has_loss else "",
            f"{mape(found, curve):.3f} / {end_error(found, curve):+.3f} %" if has_loss else "",
            outside,
        )
        saved.append(
            {
                "name": curve.name,
                "step": curve.step.tolist(),
                "loss": predicted.tolist(),
                "low": None if low is None else low.tolist(),
                "high": None if high is None else high.tolist(),
                "seen": curve.loss.tolist() if has_loss else None,
                "extrapolates": outside,
            }
        )
    show_table(table, console)
    if found.samples is None:
        console.print("no intervals: the law was fitted with --bootstrap 0", style="yellow")
    from evals.scaling.figures import draw_prediction

    return written(
        given.out,
        "prediction",
        {"fit": str(given.fit), "curves": saved},
        lambda to: draw_prediction(found, curves, seen, to),
    )


def _plan(given: argparse.Namespace) -> int:
    console, found = plain_console(), load_fit(given.fit)
    if isinstance(found.law, ChinchillaLaw):
        if given.flops is None:
            raise UserError("plan needs the budget, --flops, for a law of size and tokens")
        size = best_size(found, given.flops)
        show_size(size, console)
        from evals.scaling.figures import draw_sizes

        chosen = size
        return written(
            given.out,
            "plan",
            {"size": dataclasses.asdict(size)},
            lambda to: draw_sizes(found, chosen, to, lambda n: along_budget(n, chosen.flops)),
        )
    if isinstance(found.law, DataConstrainedLaw | ExpertsLaw):
        return plan_points(given, found, console)
    if found.law.name not in CURVE_LAWS:
        raise UserError(f"{given.fit}: {found.law.title} cannot plan a schedule or a size")
    peaks = given.lr or [found.domain["peak_lr"][1]]
    saved: dict[str, Any] = {}
    steps, parameters = given.steps, given.parameters
    if given.flops is not None:
        if given.tokens_per_step is None:
            raise UserError("plan with --flops needs --tokens-per-step")
        guess = given.warmup_steps if given.warmup_steps is not None else 100
        size = best_size_and_schedule(found, given.flops, given.tokens_per_step, peaks[0], guess)
        show_size(size, console)
        saved["size"] = dataclasses.asdict(size)
        parameters = size.parameters
        steps = int(size.tokens / given.tokens_per_step)
    if steps is None:
        raise UserError("plan needs --steps, or --flops for a law that includes N")
    if found.domain.get("parameters") and parameters is None and found.law.settings()["sized"]:
        raise UserError("the law includes N: give --parameters, or a budget with --flops")
    warmup = given.warmup_steps if given.warmup_steps is not None else max(1, steps // 50)
    if steps < 2 * warmup + 10:
        raise UserError(f"--steps is {steps}, expected at least {2 * warmup + 10}")
    choices = best_schedules(found, steps, peaks, warmup, parameters)
    show_schedules(choices, steps, console)
    if len(peaks) == 1:
        console.print(
            "The law does not model instability, so it prefers the highest peak. It was "
            f"fitted to peaks of {found.domain['peak_lr'][0]:.3g} to "
            f"{found.domain['peak_lr'][1]:.3g}.",
            style="dim",
        )
    saved["schedules"] = [dataclasses.asdict(c) for c in choices]
    first = choices[0]
    target = planned_curve(first.schedule, first.peak, steps, parameters=parameters)
    frontier, cheapest = cheapest_design(found, target, given.tolerance)
    saved["designs"] = [dataclasses.asdict(d) for d in frontier]
    saved["cheapest_design"] = None if cheapest is None else dataclasses.asdict(cheapest)
    table = titled_table(
        "runs that would determine the law",
        *("total steps", "error of the final loss", "runs"),
        left=("runs",),
    )
    at = frontier.index(cheapest) if cheapest is not None else len(frontier)
    for design in frontier[max(0, at - 3) : at + 4]:
        style = "bold" if design is cheapest else None
        table.add_row(
            f"{design.steps:,}", f"{100 * design.error:.3f} %", "\n".join(design.runs), style=style
        )
    show_table(table, console)
    if cheapest is None:
        console.print(f"no set of three runs reaches an error of {100 * given.tolerance:.2g} %")
    from evals.scaling.figures import draw_schedules

    return written(given.out, "plan", saved, lambda to: draw_schedules(choices, to))


def _compare(given: argparse.Namespace) -> int:
    console = plain_console()
    if given.bootstrap < 2:
        raise UserError(
            f"--bootstrap is {given.bootstrap}, expected at least 2 samples for a comparison"
        )
    if given.by is not None:
        families = _by_setting(given.families, given.by, console)
    else:
        families = _by_name(given.families, columns_of(given.columns), console)
    if len(families) < 2:
        raise UserError("compare needs at least two families, such as gdn=runs/gdn attn=runs/attn")
    fits = fit_families(families, given.bootstrap, given.seed)
    comparisons = compare(fits, families, given.at)
    for name, found in fits.items():
        show_fit(found, console, name)
    for comparison in comparisons:
        for sentence in sentences(comparison):
            console.print(sentence)
    from evals.scaling.figures import draw_comparison

    saved = {
        "fits": {name: found.to_json() for name, found in fits.items()},
        "comparisons": [dataclasses.asdict(c) for c in comparisons],
    }
    return written(
        given.out, "comparison", saved, lambda to: draw_comparison(fits, families, comparisons, to)
    )


def _by_name(words: Sequence[str], columns: dict[str, str], console: Console) -> dict[str, Points]:
    sources, families = dict[str, list[Path]](), dict[str, Points]()
    for word in words:
        name, equals, pattern = word.partition("=")
        if not equals or not pattern:
            raise UserError(f"found '{word}', expected NAME=SOURCE")
        sources.setdefault(name, []).extend(expand_paths([pattern]))
    for name, paths in sources.items():
        if len(paths) == 1 and is_points_table(paths[0], columns):
            families[name] = read_points(paths[0], columns)
            continue
        curves, skipped = read_curves(paths, Reading(columns))
        for sentence in skipped:
            console.print(sentence, style="yellow")
        families[name] = points_of(curves)
    return families


def _by_setting(runs: Sequence[str], setting: str, console: Console) -> dict[str, Points]:
    curves, skipped = read_curves(runs)
    for sentence in skipped:
        console.print(sentence, style="yellow")
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        if setting not in curve.labels:
            known = nearest(setting, list(curve.labels))
            raise UserError(
                f"--by is '{setting}'{known}, a setting that {curve.name} does not have"
            )
        groups.setdefault(str(curve.labels[setting]), []).append(curve)
    return {name: points_of(chosen) for name, chosen in groups.items()}
