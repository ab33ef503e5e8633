"""Read run directories for a report: settings that differ, losses, speeds and scores."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evals.report.scores import Score, read_scores
from evals.scaling.parameters import Array
from pretrain.common.config_loader import flattened
from pretrain.common.errors import UserError
from pretrain.config import RunConfig
from pretrain.model.spec import block_specs, with_sizes
from pretrain.run_arguments import distinct_names, expand_paths, read_grid, runs_of
from pretrain.run_directory import METRICS_FILE, RunDirectory, overall_speed
from pretrain.run_time import count_starts, total_seconds
from pretrain.training.branching import describe_parent

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
    # How model.mlp.intermediate_size came about, which is compared.
    "model.mlp.ratio",
    "model.mlp.multiple_of",
)


@dataclass
class Run:
    """One run directory.

    ``steps``, ``tokens``, ``loss`` (nats per token, the mean over the steps since the line before)
    and ``seconds``, of all starts, are those of the n logged losses; ``valid`` holds (tokens, nats
    per token, bits per byte or None) of every validation; ``borders`` (step, tokens, name) of every
    phase after the first; ``scores`` the results of evaluations.
    ``resolved`` are the settings by which runs are compared, ``settings`` the same as they are
    shown; ``parent`` is what a branch goes on from.
    """

    name: str
    directory: Path
    settings: dict[str, Any]
    resolved: dict[str, Any]
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
    scores: list[Score] = field(default_factory=list)
    starts: int = 1
    validation_tokens: int = 0
    parent: dict[str, Any] = field(default_factory=dict)
    borders: list[tuple[float, float, str]] = field(default_factory=list)

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
    """Return every run under ``paths``, each once, and sentences about what the report lacks.

    Raises UserError where a path does not exist or no run has logged a loss.
    """
    runs, notes, seen = list[Run](), list[str](), set[Path]()
    for path in expand_paths(paths):
        found = runs_of(path)
        if not found and not RunDirectory(path).config_file.exists():
            notes.append(f"{path} holds no run (no {METRICS_FILE})")
        elif not found:
            notes.append(f"{path} has logged no loss yet")
        for directory in found:
            if directory.path.resolve() in seen:
                continue
            seen.add(directory.path.resolve())
            run = read_run(directory)
            if run is None:
                notes.append(f"{directory} has logged no loss yet")
            else:
                runs.append(run)
    if not runs:
        raise UserError(f"nothing to report: {'; '.join(notes) or 'no run is named'}")
    for run, name in zip(runs, distinct_names([run.directory for run in runs]), strict=True):
        run.name = name
    return runs, [*notes, *_remarks(runs)]


def _remarks(runs: Sequence[Run]) -> list[str]:
    """Return sentences about numbers of the runs that need one."""
    again = [f"{run.name} ({run.starts})" for run in runs if run.starts > 1]
    sentences = []
    if again:
        sentences.append(
            f"started more than once: {', '.join(again)}; hours are those of all starts, up to the "
            "last step that each has logged (what one did after it, before it was killed, is not "
            "known)"
        )
    for run in runs:
        if run.parent:
            sentences.append(
                f"{run.name} is a branch of {describe_parent(run.parent)}; its tokens and FLOPs "
                "are those of both, its hours its own"
            )
        if run.borders:
            begun = [f"{name} after {int(tokens):,} tokens" for _, tokens, name in run.borders]
            sentences.append(f"phases of {run.name} (dotted in the curves): {', '.join(begun)}")
    validated = {run.validation_tokens for run in runs if run.valid}
    if len(validated) > 1:
        sizes = ", ".join(f"{tokens:,}" for tokens in sorted(validated))
        sentences.append(
            f"validation losses are of different amounts of text (validation.tokens: {sizes})"
        )
    return sentences


def read_run(directory: RunDirectory) -> Run | None:
    """Read a run directory; return None where no loss is logged yet.

    Raises UserError for a damaged config.
    """
    every = directory.read_metrics()
    seconds = total_seconds(directory, every)
    by_step = {
        r["step"]: (r, s)
        for r, s in zip(every, seconds, strict=True)
        if isinstance(r.get("loss"), int | float)
    }
    known = [by_step[s] for s in sorted(by_step) if np.isfinite(by_step[s][0]["loss"])]
    if not known or not directory.config_file.exists():
        return None
    rows = [row for row, _ in known]
    config = directory.read_config()
    model = directory.read_model()
    settings, resolved = _settings(config, model, str(directory))
    shares = [r["mfu"] for r in rows if r.get("mfu")]
    return Run(
        directory.name,
        directory.path,
        settings,
        resolved,
        config.seed,
        np.array([r["step"] for r in rows]),
        np.array([float(r["tokens"]) for r in rows]),
        # Runs of earlier versions logged single steps' losses alone.
        np.array([float(r.get("loss_mean", r["loss"])) for r in rows]),
        np.array([s or 0.0 for _, s in known]),
        config.plan.num_steps,
        [
            (float(r["tokens"]), float(r["valid_loss"]), r.get("valid_bits_per_byte"))
            for r in every
            if isinstance(r.get("valid_loss"), int | float)
        ],
        overall_speed(rows),
        float(np.median(shares)) if shares else None,
        model.get("parameters"),
        model.get("training_flops_per_token"),
        read_scores(directory),
        count_starts(directory),
        config.validation.tokens,
        directory.read_parent(),
        [
            (float(r["step"]), float(r["tokens"]), str(r["phase_name"]))
            for r in every
            if r.get("phase_begins", 1) > 1
        ],
    )


def _settings(
    config: RunConfig, model: dict[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is trained by dotted name, as it is shown and as it is compared.

    Two ways to say the same compare equal: a size that is null or written out, a budget in steps
    or in tokens, a pattern with or without its repetitions, settings of a mixer that it lacks.
    """
    config = copy.deepcopy(config)
    config.model = with_sizes(config.model, where)
    names = [spec.name for spec in block_specs(config.model, where)]
    config.model.mixers = {k: v for k, v in config.model.mixers.items() if k in names}
    config.model.vocab_size = config.model.vocab_size or model.get("vocab_size")
    config.train.steps, config.train.tokens = config.plan.num_steps, None
    shown = {
        k: v
        for k, v in flattened(dataclasses.asdict(config)).items()
        if not k.startswith(_IRRELEVANT) and k != "seed"
    }
    sections: dict[str, Any] = {
        "model.moe": config.model.moe,
        "model.recursion": config.model.recursion,
        "initialize": config.initialize,
        "branch": config.branch,
    }
    shown |= {name: "no" if section is None else "yes" for name, section in sections.items()}
    return shown, {**shown, "model.pattern": " ".join(names)}


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group runs that differ only in their seed, in the order of their final loss."""
    keys = sorted({k for run in runs for k in run.settings})
    # A setting of a mixer or section that a run lacks is no difference beside that.
    differing = [
        k
        for k in keys
        if len({json.dumps(r.resolved[k], sort_keys=True) for r in runs if k in r.resolved}) > 1
    ]
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        values = json.dumps([run.resolved.get(k) for k in differing], sort_keys=True)
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
    if isinstance(value, float):  # two values never look alike
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "-" if value is None else str(value)


def matches_of(paths: Sequence[str | Path]) -> list[str]:
    """Return a sentence per grid that says in what its members match, if in anything."""
    notes = dict[Path, str]()
    for path in expand_paths(paths):
        for folder in (path, path.parent):
            grid = read_grid(folder)
            if grid and folder.resolve() not in notes:
                budget = grid.get("match")
                words = f"matched in {budget}" if budget else "not matched (no grid.match)"
                notes[folder.resolve()] = f"{folder.resolve().name}: members are {words}"
    return list(notes.values())
