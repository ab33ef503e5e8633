"""The options of ``python -m evals scaling``, and what they are converted to."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast, get_args

from evals.scaling.columns import OF_CURVES, OF_RUNS
from evals.scaling.fitting import HUBER, Options, Residual
from evals.scaling.laws import LAWS
from evals.scaling.reading import Reading, Unit
from evals.scaling.schedules import MOST_STEPS
from pretrain.common.errors import UserError
from pretrain.common.yaml_text import read_file

T = TypeVar("T")
SCHEDULE = '"kind=wsd lr=3e-4 steps=24000 warmup_steps=2000 decay_fraction=0.2"'


# By option: the lowest and the highest value, of those that are given.
_COUNTS = {
    "seed": (0, 2**63 - 1),
    "bootstrap": (0, 1_000_000),
    "steps": (1, MOST_STEPS),
    "warmup_steps": (0, MOST_STEPS),
    "from_step": (0, MOST_STEPS),
    "points": (0, 1_000_000),
}
_POSITIVE = (
    *("parameters", "tokens_per_step", "flops", "at", "huber", "tolerance"),
    *("tokens", "unique_tokens", "total_parameters", "experts_ratio"),
)


def check_numbers(given: argparse.Namespace) -> None:
    """Raise UserError where an option is a number that cannot be meant."""
    for name, value in vars(given).items():
        option = f"--{name.replace('_', '-')}"
        low, high = _COUNTS.get(name, (-math.inf, math.inf))
        number = isinstance(value, int | float)
        if number and name in _COUNTS and not low <= value <= high:
            raise UserError(f"{option} is {value}, expected {low:,} to {high:,}")
        if isinstance(value, int | float) and name in _POSITIVE and not 0 < value < math.inf:
            raise UserError(f"{option} is {value}, expected a number above 0")


def reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of reading loss curves."""
    parser.add_argument(
        "sources",
        nargs="+",
        help="run directories, grids, folders or globs of them, .csv, .parquet, .jsonl, "
        "TensorBoard events, trainer_state.json, Megatron-LM's logs, or a curves.yaml that lists "
        "some",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="WHAT=NAME",
        default=[],
        help="names of columns, such as loss=train/ce step=it; also lr, tokens, samples, and of a "
        "table with a row per run parameters, unique_tokens, flops, name",
    )
    parser.add_argument(
        "--schedule",
        help=f"schedule of all sources, such as {SCHEDULE}, or a YAML file of CURVE: SETTINGS",
    )
    for option, what, text in (
        ("--warmup-steps", "STEPS", "where neither schedule nor log has the steps of warm-up"),
        ("--parameters", "N", "N of all curves, or of those with a name or pattern"),
        ("--tokens-per-step", "TOKENS", "the same of the batch size"),
        ("--unit", "nats|bits", "unit of the losses, per token (nats)"),
    ):
        parser.add_argument(option, nargs="+", metavar=f"[CURVE=]{what}", help=text)
    parser.add_argument(
        "--branch-of",
        nargs="+",
        metavar="CURVE=TRUNK",
        help="the curve whose learning rates a branch has before it begins; TRUNK@STEP says where",
    )
    parser.add_argument(
        "--points",
        type=int,
        default=Reading.points,
        help="means to which logs of more than twice as many losses are reduced "
        f"({Reading.points}; 0: none)",
    )
    parser.add_argument("--from-step", type=int, help="skip earlier losses (those of the warm-up)")
    parser.add_argument(
        "--smooth",
        type=float,
        default=0.0,
        metavar="FACTOR",
        help="smooth the losses by an exponential mean (off)",
    )
    parser.add_argument("--no-embeddings", action="store_true", help="count N without embeddings")
    parser.add_argument("--keep-diverged", action="store_true", help="fit runs that diverged too")


def fitting_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of fitting a law."""
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=200,
        metavar="SAMPLES",
        help="bootstrap samples for 95 %% intervals (200; 0: no intervals)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--residual", choices=("relative", "log"))
    parser.add_argument("--huber", type=float, default=HUBER)
    parser.add_argument("--no-priors", action="store_true")


def out_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of the output folder."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/scaling"),
        help="folder for the JSON file and the picture (runs/scaling)",
    )


def fit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fit``."""
    reading_options(parser)
    parser.add_argument(
        "--law",
        default=None,
        metavar="LAW",
        help=f"{', '.join(LAWS)} (for curves: auto, by held-out schedules or sizes, says why)",
    )
    parser.add_argument("--sized", action="store_true", help="curve laws: add B N^-beta")
    parser.add_argument(
        "--size-in-annealing", action="store_true", help="multiply the annealing term by N^gamma"
    )
    parser.add_argument(
        "--size-in-progress", action="store_true", help="multiply the progress term by N^eta"
    )
    parser.add_argument(
        "--test",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="curves, or tables of runs, to compare with the fit's predictions",
    )
    table_options(parser)
    fitting_options(parser)
    out_option(parser)


def predict_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``predict``."""
    parser.add_argument("fit", type=Path, help="fit.json")
    parser.add_argument(
        "--schedule",
        action="append",
        default=[],
        metavar="SETTINGS",
        help=f"such as {SCHEDULE}; repeatable",
    )
    parser.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="SOURCE",
        help="a run, CSV or table of runs to compare the prediction with",
    )
    parser.add_argument("--parameters", type=float, help="N, for laws that include it")
    point_options(parser)
    out_option(parser)


def plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plan``."""
    parser.add_argument("fit", type=Path, help="fit.json")
    parser.add_argument("--steps", type=int, help="curve laws: steps of the planned run")
    parser.add_argument("--flops", type=float, help="laws with N: the budget, 6 N D")
    parser.add_argument("--tokens-per-step", type=float)
    parser.add_argument("--parameters", type=float, help="N of the planned run")
    parser.add_argument("--unique-tokens", type=float, help="data_constrained: how much data")
    parser.add_argument("--experts-ratio", type=float, help="experts: total / active parameters")
    parser.add_argument(
        "--lr", type=float, nargs="+", help="peaks to choose from (the highest fitted)"
    )
    parser.add_argument("--warmup-steps", type=int, help="steps of warm-up (2 %% of all)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.002,
        help="relative standard error of the final loss that proposed runs should reach (0.002)",
    )
    out_option(parser)


def table_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of fitting to a table with a row per run."""
    parser.add_argument(
        "--keep-outliers", action="store_true", help="tables: fit to the runs named as outliers too"
    )
    parser.add_argument(
        "--hold-out-largest",
        action="store_true",
        help="tables: predict the runs of the largest size from the others",
    )


def point_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a planned run, for laws of sizes."""
    parser.add_argument("--tokens", type=float, help="D, for laws of final losses")
    parser.add_argument("--unique-tokens", type=float, help="of the data, for data_constrained")
    parser.add_argument("--total-parameters", type=float, help="of all experts, for experts")
    parser.add_argument("--columns", nargs="+", metavar="WHAT=NAME", default=[])


def compare_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``compare``."""
    parser.add_argument(
        "families",
        nargs="+",
        metavar="NAME=SOURCE",
        help="a family's runs, folders of runs or a table; * and ? are wildcards; a name may be "
        "repeated",
    )
    parser.add_argument(
        "--by",
        metavar="SETTING",
        help="form families by a setting of the runs, such as model.pattern; sources then have no "
        "names",
    )
    parser.add_argument("--at", type=float, help="FLOPs to compare at (100 x the largest run)")
    parser.add_argument("--columns", nargs="+", metavar="WHAT=NAME", default=[])
    parser.add_argument("--bootstrap", type=int, default=200, metavar="SAMPLES")
    parser.add_argument("--seed", type=int, default=0)
    out_option(parser)


def columns_of(given: Sequence[str]) -> dict[str, str]:
    """Convert ``WHAT=NAME`` words to names of columns; raises UserError for others."""
    found = {}
    for word in given:
        what, equals, name = word.partition("=")
        if not equals or not name:
            raise UserError(f"--columns holds '{word}', expected WHAT=NAME, such as loss=train/ce")
        found[what] = name
    return found


def reading_of(given: argparse.Namespace) -> Reading:
    """Convert the options of reading; raises UserError for values that do not fit."""
    if not 0 <= given.smooth < 1:
        raise UserError(f"--smooth is {given.smooth}, expected 0 or more and below 1")
    columns = columns_of(given.columns)
    for what in columns:
        if what not in (*OF_CURVES, *OF_RUNS):
            known = ", ".join(dict.fromkeys((*OF_CURVES, *OF_RUNS)))
            raise UserError(f"--columns names '{what}', expected one of {known}")
    return Reading(
        columns,
        schedules_of(given.schedule),
        by_name("--warmup-steps", given.warmup_steps, _whole),
        by_name("--parameters", given.parameters, _positive),
        by_name("--tokens-per-step", given.tokens_per_step, _positive),
        given.from_step,
        given.smooth,
        not given.no_embeddings,
        given.keep_diverged,
        by_name("--unit", given.unit, _unit) or "nats",
        by_name("--branch-of", given.branch_of, lambda _, text: text),
        given.points,
    )


def by_name(
    option: str, given: Sequence[str] | None, convert: Callable[[str, str], T]
) -> T | dict[str, T] | None:
    """Convert one value for all curves, or CURVE=VALUE words; raises UserError for a mixture."""
    if given is None:
        return None
    words = [word.rpartition("=") for word in given]
    if len(words) == 1 and not words[0][1] and option != "--branch-of":
        return convert(option, given[0])
    for word, (name, _, value) in zip(given, words, strict=True):
        if not name or not value:
            if option == "--branch-of":
                raise UserError(f"{option} is '{word}', expected CURVE=TRUNK")
            raise UserError(f"{option} holds '{word}', expected CURVE=VALUE, or one value for all")
    return {name: convert(option, value) for name, _, value in words}


def _positive(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{option} is '{text}', expected a number above 0") from None
    if not 0 < value < math.inf:
        raise UserError(f"{option} is {value}, expected a number above 0")
    return value


def _whole(option: str, text: str) -> int:
    low, high = _COUNTS["warmup_steps"]
    if not (text.lstrip("-").isdigit() and low <= int(text) <= high):
        raise UserError(f"{option} is {text}, expected {low:,} to {high:,}")
    return int(text)


def _unit(option: str, text: str) -> Unit:
    if text not in get_args(Unit):
        raise UserError(f"{option} is '{text}', expected {' or '.join(get_args(Unit))}")
    return cast(Unit, text)


def schedules_of(given: str | None) -> str | dict[str, str] | None:
    """Return the schedule's settings, or those of each curve by name from a YAML file.

    Raises UserError for a file that cannot be read or holds something else.
    """
    if given is None or Path(given).suffix not in (".yaml", ".yml"):
        return given
    try:
        found = read_file(Path(given))
    except ValueError as error:
        raise UserError(f"--schedule {given}: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise UserError(f"--schedule {given}: expected CURVE: SETTINGS, such as a: {SCHEDULE}")
    return dict(found)


def options_of(given: argparse.Namespace, points: bool) -> Options:
    """Convert the options of fitting; raises UserError for values that do not fit."""
    residual: Residual = given.residual or ("log" if points else "relative")
    return Options(residual, given.huber, priors=not given.no_priors)
