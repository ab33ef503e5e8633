"""``python -m evals.synthetic TASK --pattern PATTERN``: train a model on a synthetic task.

``--suite FILE.yaml`` runs a list of such trainings and prints them as a markdown table.
``python -m evals.synthetic text NAME`` writes problems and answers in English to train on,
``claim NAME`` decides on a claim of a paper, ``table`` compares all mixers on five tasks.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.synthetic.results import label, result_of, result_path
from evals.synthetic.settings import TEST_FACTORS, SyntheticConfig, check_config
from evals.synthetic.tasks import TASKS
from evals.synthetic.training import LAST
from pretrain.common.config_loader import ConfigError, build_config, load_config
from pretrain.common.errors import UserError, run_command, short
from pretrain.common.outputs import check_folder
from pretrain.common.screen import show_table, titled_table
from pretrain.common.yaml_text import parse_value
from pretrain.model.spec import block_specs
from pretrain.parallel.processes import start_processes, stop_processes

OUTPUT = "runs/synthetic"
_TEXTS = ("task", "pattern", "mlp")  # settings that are text whatever they look like


@dataclass
class SuiteConfig:
    """A list of runs.

    ``defaults`` are settings by task; each of ``runs`` gives the settings that differ from them,
    with a list ``seeds`` instead of ``seed``.
    """

    runs: list[dict[str, Any]]
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one task or a suite, by default as ``sys.argv`` says, and print the scores."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["text"]:
        from evals.synthetic.text_files import main as write_text

        return write_text(arguments[1:])
    if arguments[:1] == ["claim"]:
        from evals.synthetic.claims.command import main as run_claim

        return run_claim(arguments[1:])
    if arguments[:1] == ["table"]:
        from evals.synthetic.table import main as make_table

        return make_table(arguments[1:])
    options = _parser().parse_args(arguments)
    output = Path(options.output)
    if (options.task is None) == (options.suite is None):
        raise UserError("expected either a task or --suite, exactly one of them")
    check_folder(output, "--output")
    configs = [_command_line(options)] if options.suite is None else load_suite(options.suite)
    start_processes()
    try:
        results = [result_of(config, output) for config in configs]
    finally:
        stop_processes()
    if options.suite is None:
        _show(results[0])
        print(f"written to {result_path(configs[0], output)}")
    else:
        print(markdown(results))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals.synthetic",
        description="Train a model on a synthetic task and score it.",
    )
    parser.add_argument("task", nargs="?", help=", ".join(TASKS))
    parser.add_argument("--suite", help="a YAML file of runs, instead of a task")
    parser.add_argument("--output", default=OUTPUT, help=f"folder of the JSON files ({OUTPUT})")
    parser.add_argument(
        "--mixer",
        action="append",
        default=[],
        metavar="[NAME.]KEY=VALUE",
        help="a mixer's setting; with NAME if the pattern has several mixers",
    )
    for item in dataclasses.fields(SyntheticConfig):
        if item.name not in ("task", "mixers"):
            parser.add_argument(f"--{item.name.replace('_', '-')}", metavar="VALUE")
    return parser


def _command_line(options: argparse.Namespace) -> SyntheticConfig:
    names = [item.name for item in dataclasses.fields(SyntheticConfig) if item.name != "mixers"]
    given = {name: getattr(options, name) for name in names}
    values = {
        name: text if name in _TEXTS else _value(text, f"--{name.replace('_', '-')}")
        for name, text in given.items()
        if text is not None
    }
    config = build_config(SyntheticConfig, values, "command line")
    where = "command line"
    mixers = list(dict.fromkeys(s.name for s in block_specs(config.model(where), where)))
    for item in options.mixer:
        key, separator, text = item.partition("=")
        name, dot, inner = key.rpartition(".")
        if not separator or not inner:
            raise UserError(f"--mixer is '{item}', expected KEY=VALUE or NAME.KEY=VALUE")
        if not dot and len(mixers) > 1:
            raise UserError(
                f"--mixer is '{item}', but the pattern has several mixers ({', '.join(mixers)}); "
                f"expected NAME.KEY=VALUE, such as {mixers[0]}.{item}"
            )
        config.mixers.setdefault(name or mixers[0], {})[inner] = _value(text, f"--mixer {key}")
    check_config(config, "command line")
    return config


def _value(text: str, option: str) -> Any:
    """Return the value of an option, as those of overrides are read."""
    try:
        return parse_value(text)
    except ValueError as error:
        raise UserError(f"{option} is {short(text)}: {error}") from None


def load_suite(path: str) -> list[SyntheticConfig]:
    """Read and check a suite's runs, one for each seed; raises ConfigError naming the run."""
    suite = load_config(SuiteConfig, path)
    configs = []
    for index, given in enumerate(suite.runs):
        where = f"{path}: runs[{index}]"
        values = {**suite.defaults.get(str(given.get("task")), {}), **given}
        seeds = values.pop("seeds", [0])
        if not isinstance(seeds, list) or not seeds:
            raise ConfigError(f"{where}: seeds is {seeds!r}, expected a list of whole numbers")
        for seed in seeds:
            configs.append(build_config(SyntheticConfig, {**values, "seed": seed}, where))
            check_config(configs[-1], where)
        tested = (configs[-1].test_factors, configs[-1].test_recurrences)
        if tested != ([*TEST_FACTORS], []):
            raise ConfigError(
                f"{where}: test_factors and test_recurrences are {tested[0]} and {tested[1]}, "
                f"expected {[*TEST_FACTORS]} and []: a suite's table has no other columns"
            )
    return configs


def _show(result: dict[str, Any]) -> None:
    settings = result["settings"]
    table = titled_table(
        f"{settings['task']}: {label(settings)}",
        *("length", "accuracy", "whole rows", f"last {LAST} positions"),
    )
    for score in result["tests"]:
        passes = f", {score['passes']} passes" if "passes" in score else ""
        table.add_row(f"{score['length']}{passes}", *_cells(score))
    table.caption = f"chance {result['chance']:.4f}, final loss {result['final_loss']:.4f}"
    show_table(table)


def _cells(score: dict[str, Any]) -> list[str]:
    values = (score["accuracy"], score["rows"], score["last"])
    return ["-" if value is None else f"{value:.3f}" for value in values]


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a markdown table per task, with a line per model and its seeds side by side."""
    tasks: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for result in results:
        models = tasks.setdefault(result["settings"]["task"], {})
        models.setdefault(repr({**result["settings"], "seed": None}), []).append(result)
    scores = [f"{name} {f}x" for f in TEST_FACTORS for name in ("accuracy", "rows", f"last {LAST}")]
    names = ["model", "parameters", "steps", "seeds", "loss", *scores, "minutes"]
    lines = []
    for task, models in tasks.items():
        chance = next(iter(models.values()))[0]["chance"]
        lines += [f"### {task}, chance {chance:.3f}", ""]
        lines += [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        lines += [f"| {' | '.join(_line(seeds))} |" for seeds in models.values()]
        lines.append("")
    return "\n".join(lines)


def _line(seeds: list[dict[str, Any]]) -> list[str]:
    settings = seeds[0]["settings"]
    scores = zip(*[[c for score in r["tests"] for c in _cells(score)] for r in seeds], strict=True)
    return [
        f"`{label(settings)}`".replace("|", r"\|"),
        f"{seeds[0]['parameters']:,}",
        str(settings["steps"]),
        " ".join(str(r["settings"]["seed"]) for r in seeds),
        " ".join(f"{r['final_loss']:.3f}" for r in seeds),
        *(" ".join(cells) for cells in scores),
        f"{sum(r['minutes'] for r in seeds):.1f}",
    ]


if __name__ == "__main__":
    run_command(main)
