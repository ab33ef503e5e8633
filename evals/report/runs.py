"""Read run directories for a report: settings that differ, losses, speeds and scores."""

from __future__ import annotations

import copy
import dataclasses
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

_TIMES = "time/"  # of metrics: seconds by what they were spent on
_CUT = 80  # letters from which on a member's name is not all of it
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
    shown; ``labels`` those that a grid sets, as the grid names their values; ``parent`` is what a
    branch goes on from; ``spent`` are the seconds of all starts by what they were spent on.
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
    labels: dict[str, str] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)

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
    def goodput(self) -> float | None:
        """Return the share of all starts' time that trained, None where not known."""
        total = sum(self.spent.values())
        return self.spent.get("train", 0.0) / total if total else None

    @property
    def state(self) -> str:
        """The word "done", or how far the run is."""
        done = int(self.steps[-1])
        return "done" if done >= self.num_steps else f"step {done:,} of {self.num_steps:,}"


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
        grid_labels(directory.path, settings),
        _spent(every),
    )


def _spent(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds by what they were spent on, over all starts of a run.

    Every line has those of its start so far: the last line of each start counts.
    """
    found, before = dict[str, float](), dict[str, float]()
    for row in rows:
        now = {
            name.removeprefix(_TIMES): float(value)
            for name, value in row.items()
            if name.startswith(_TIMES) and isinstance(value, int | float)
        }
        if now and sum(now.values()) < sum(before.values()):
            found = {name: found.get(name, 0) + before.get(name, 0) for name in {**found, **before}}
        before = now or before
    return {name: found.get(name, 0) + before.get(name, 0) for name in {**found, **before}}


def grid_labels(directory: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Return what a grid calls the values of a member's settings, by dotted name.

    Grids of earlier versions noted the members' names alone, which say the same.
    """
    for path in (directory, directory.resolve()):
        grid = read_grid(path.parent)
        labels = grid.get("labels")
        noted = labels.get(path.name) if isinstance(labels, dict) else None
        if isinstance(noted, dict):
            return {name: str(label) for name, label in noted.items() if name != "seed"}
        members = grid.get("members")
        if isinstance(members, list) and path.name in members and len(path.name) < _CUT:
            parts = [part.partition("=") for part in path.name.split(",")]
            return {_dotted(name, settings): label for name, _, label in parts if name != "seed"}
    return {}


def _dotted(short: str, settings: dict[str, Any]) -> str:
    """Return the only setting or section of this last part, or else the part itself."""
    sections = {
        ".".join(parts[:count])
        for parts in (name.split(".") for name in settings)
        for count in range(1, len(parts) + 1)
    }
    found = [name for name in sections if f".{name}".endswith(f".{short}")]
    return found[0] if len(found) == 1 else short


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
