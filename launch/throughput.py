"""Measure the tokens per second of a grid's members, on the hardware where they will run.

With ``match: time`` each member gets as many tokens as it can process in the first member's time
(Languini, arXiv 2309.11197).
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from launch.local import command_of, environment_of, processes_of
from pretrain.common.config_loader import ConfigError
from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.config import RunConfig, to_yaml
from pretrain.run_directory import RunDirectory

FILE = "throughput.json"
_WARMUP_STEPS = 2  # not timed


def read_throughput(directory: Path, names: Sequence[str]) -> dict[str, float]:
    """Read the tokens per second by member; raises ConfigError where one was not measured."""
    try:
        found = json.loads((directory / FILE).read_bytes())
    except (OSError, ValueError):
        found = {}
    missing = [name for name in names if name not in found]
    if missing:
        raise ConfigError(
            f"{directory / FILE} has no tokens per second of {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}; run python -m launch measure first, on "
            "the hardware that the runs will use"
        )
    return {name: float(found[name]) for name in names}


class Speed(NamedTuple):
    """The tokens per second of a run, and of each of its phases, by name, if it has any."""

    tokens_per_second: float
    phases: dict[str, float]


def measure(config: RunConfig, steps: int, processes: int | None) -> Speed:
    """Train each phase for a few steps, and return the median tokens per second over ``steps``.

    That of a run in phases is its tokens by the time that they take together. Raises UserError when
    the run fails.
    """
    if not config.phases:
        return Speed(_measure(config, steps, processes), {})
    known, speeds, seconds = dict[tuple[int, ...], float](), dict[str, float](), 0.0
    plan = config.plan
    for phase in plan.phases:
        own = phase.config
        sizes = own.train.seq_len, own.train.global_batch_tokens, own.parallel.micro_batch_size
        if sizes not in known:
            known[sizes] = _measure(own, steps, processes)
        speeds[phase.name] = known[sizes]
        seconds += phase.tokens / known[sizes]
    return Speed(plan.tokens / seconds, speeds)


def _measure(config: RunConfig, steps: int, processes: int | None) -> float:
    config = copy.deepcopy(config)
    train = config.train
    train.steps, train.tokens = steps + _WARMUP_STEPS, None
    train.batch_warmup_steps, train.batch_warmup_start = 0, None
    config.schedule.warmup_steps, config.schedule.kind = 0, "constant"
    config.validation.every, config.validation.tokens, config.sample.tokens = 0, 1, 0
    config.checkpoint.every, config.logging.every = 10**9, 1
    config.checkpoint.resume, config.checkpoint.keep, config.branch = None, [], None
    with tempfile.TemporaryDirectory(prefix="measure-") as folder:
        config.directory = str(Path(folder) / "run")
        path = Path(folder) / "run.yaml"
        path.write_text(to_yaml(config))
        count = processes_of(config, processes)
        done = subprocess.run(
            command_of(path, count),
            capture_output=True,
            text=True,
            check=False,
            env=environment_of(count),
        )
        if done.returncode:
            errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
            raise UserError(f"{config.name} could not be measured: {(errors or ['?'])[0]}")
        rows = [
            row["tokens_per_second"]
            for row in RunDirectory(config.directory).read_metrics()
            if row.get("tokens_per_second")
        ]
    return statistics.median(rows[_WARMUP_STEPS:])


def write_throughput(directory: Path, values: dict[str, float]) -> Path:
    """Save measured tokens per second by member, so that every launch has the same budgets.

    Returns the file's path.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    write_json(path, values)
    return path
