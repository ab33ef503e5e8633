"""Read run directories for a report: settings that differ, losses, speeds and scores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evals.scaling.parameters import Array
from pretrain.common.config_loader import flattened
from pretrain.common.errors import UserError
from pretrain.run_directory import METRICS_FILE, RunDirectory, overall_speed

LAST = 5  # logged losses whose mean is the final loss
# Settings that do not change what is trained.
_IRRELEVANT = (
    "name",
    "directory",
    "logging.",
    "checkpoint.",
    "sample.",
    "callbacks",
    "parallel.timeout_minutes",
    "train.threads",
    "data.verify",
    "validation.",
    "eval.",
)


@dataclass
class Run:
    """One run directory.

    ``steps``, ``tokens``, ``loss`` (nats per token, the mean over the steps since the line before)
    and ``seconds`` are those of the n logged losses; ``valid`` holds (tokens, nats per token, bits
    per byte or None) of every validation; ``scores`` the result of each evaluation.
    """

    name: str
    directory: Path
    settings: dict[str, Any]
    seed: int
    steps: Array
    tokens: Array
    loss: Array
    seconds: Array
    num_steps: int
    valid: list[tuple[float, float, float | None]]
    tokens_per_second: float | None
    mfu: float | None
    parameters: int | None = None
    flops_per_token: float | None = None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def final(self) -> float:
        """The mean of the last logged losses."""
        return float(self.loss[-LAST:].mean())

    @property
    def best(self) -> float:
        """The lowest mean of as many consecutive losses as the final loss averages."""
        width = min(LAST, len(self.loss))
        return float(np.convolve(self.loss, np.full(width, 1 / width), "valid").min())

    @property
    def flops(self) -> Array | None:
        """Training FLOPs at each logged loss, None where not known."""
        return None if self.flops_per_token is None else self.tokens * self.flops_per_token

    @property
    def state(self) -> str:
        """The word "done", or how far the run is."""
        done = int(self.steps[-1])
        return "done" if done >= self.num_steps else f"step {done:,} of {self.num_steps:,}"


@dataclass
class Group:
    """Runs that differ only in their seed; ``label`` lists the settings in which groups differ."""

    label: str
    differing: dict[str, Any]
    runs: list[Run]

    def mean(self, values: Sequence[float | None]) -> tuple[float, float | None] | None:
        """Return the mean, and the standard deviation over several seeds.

        Returns None where a run has no value.
        """
        known = [v for v in values if v is not None]
        if not known or len(known) < len(values):
            return None
        return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None


def find_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """Return every run under ``paths``, and a sentence for each directory without one.

    Raises UserError where a path does not exist or no run has logged a loss.
    """
    runs, notes = list[Run](), list[str]()
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such run directory")
        found = RunDirectory.find_below(path)
        if not found:
            notes.append(f"{path} holds no run (no {METRICS_FILE})")
        for directory in found:
            run = read_run(directory)
            if run is None:
                notes.append(f"{directory} has logged no loss yet")
            else:
                runs.append(run)
    if not runs:
        raise UserError(f"nothing to report: {'; '.join(notes)}")
    return runs, notes


def read_run(directory: RunDirectory) -> Run | None:
    """Read a run directory; return None where no loss is logged yet.

    Raises UserError for a damaged config.
    """
    every = directory.read_metrics()
    by_step = {r["step"]: r for r in every if isinstance(r.get("loss"), int | float)}
    rows = [by_step[s] for s in sorted(by_step) if np.isfinite(by_step[s]["loss"])]
    if not rows or not directory.config_file.exists():
        return None
    config = directory.read_config()
    settings = {
        k: v
        for k, v in flattened(dataclasses.asdict(config)).items()
        if not k.startswith(_IRRELEVANT) and k != "seed"
    }
    model = directory.read_model()
    shares = [r["mfu"] for r in rows if r.get("mfu")]
    return Run(
        directory.name,
        directory.path,
        settings,
        config.seed,
        np.array([r["step"] for r in rows]),
        np.array([float(r["tokens"]) for r in rows]),
        # Runs of earlier versions logged single steps' losses alone.
        np.array([float(r.get("loss_mean", r["loss"])) for r in rows]),
        _seconds(rows),
        config.train.num_steps,
        [
            (float(r["tokens"]), float(r["valid_loss"]), r.get("valid_bits_per_byte"))
            for r in every
            if isinstance(r.get("valid_loss"), int | float)
        ],
        overall_speed(rows),
        float(np.median(shares)) if shares else None,
        model.get("parameters"),
        model.get("training_flops_per_token"),
        _scores(directory),
    )


def _seconds(rows: Sequence[dict[str, Any]]) -> Array:
    """Return the seconds of training; the clock of the log restarts with each start."""
    total, before = [], 0.0
    offset = 0.0
    for row in rows:
        now = float(row.get("seconds") or 0.0)
        if now < before:
            offset += before
        before = now
        total.append(offset + now)
    return np.array(total)


def _scores(directory: RunDirectory) -> dict[str, float]:
    """Return the latest result of each evaluation.

    That is bits per byte for perplexity, numbers named accuracy or score for others, and the first
    score of lm-eval's tasks (normalized by length if there is such a score).
    """
    found: dict[str, tuple[int, float]] = {}
    for path in sorted(directory.evals.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError:
            continue
        task, step = str(result.get("task", path.stem)), int(result.get("step", 0))
        listed = result.get("scores")
        scores = listed if isinstance(listed, dict) else result
        wanted = [k for k in ("bits_per_byte", "accuracy", "score") if k in scores]
        if scores is listed and listed:
            wanted = ["acc_norm" if "acc_norm" in listed else next(iter(listed))]
        for key in wanted:
            if isinstance(scores[key], int | float):
                name = f"{task} {key.replace('_', ' ')}"
                if step >= found.get(name, (-1, 0.0))[0]:
                    found[name] = step, float(scores[key])
    return {name: value for name, (_, value) in found.items()}


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group runs that differ only in their seed, in the order of their final loss."""
    keys = sorted({k for run in runs for k in run.settings})
    differing = [
        k for k in keys if len({json.dumps(r.settings.get(k), sort_keys=True) for r in runs}) > 1
    ]
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        values = json.dumps([run.settings.get(k) for k in differing], sort_keys=True)
        by_settings.setdefault(values, []).append(run)
    short = _short_names(differing)
    groups = []
    for members in by_settings.values():
        settings = {short[k]: members[0].settings.get(k) for k in differing}
        words = [f"{k}={_value(v)}" for k, v in settings.items()]
        groups.append(Group(", ".join(words) or members[0].name, settings, members))
    return sorted(groups, key=lambda g: float(np.mean([r.final for r in g.runs])))


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shorten each dotted name to as few of its last parts as make it unique."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if sum(k == name or k.endswith("." + name) for k in keys) == 1:
                break
        names[key] = name
    return names


def _value(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def matches_of(paths: Sequence[str | Path]) -> list[str]:
    """Return a sentence per grid that says in what its members match, if in anything."""
    notes = []
    for path in map(Path, paths):
        for file in sorted({path / "grid.json", path.parent / "grid.json"}):
            if file.exists():
                grid = json.loads(file.read_text())
                budget = grid.get("match")
                words = f"matched in {budget}" if budget else "not matched (no grid.match)"
                notes.append(f"{file.parent.name}: members are {words}")
    return list(dict.fromkeys(notes))
