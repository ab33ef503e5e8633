"""The directory of a run: the names and formats of its files, its lock, its checkpoints.

Nothing here needs torch: whoever launches or reports runs reads them without it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint_folders import (
    CHECKPOINT,
    FILES_FILE,
    LATEST,
    latest_in,
    marked_in,
    unchanged,
)
from pretrain.common.errors import UserError
from pretrain.common.files import finite_or_null, write_bytes, write_json
from pretrain.common.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    LAUNCH_CONFIG_FILE,
    METRICS_FILE,
)
from pretrain.config import ConfigError, RunConfig, legacy, load_saved_config, to_yaml
from pretrain.run_lock import LockedDirectory

if TYPE_CHECKING:
    import pandas

_COLUMNS = [  # of the metrics of every run
    *("step", "tokens", "loss", "loss_mean", "lr", "grad_norm", "tokens_per_second", "mfu"),
    *("memory", "skipped", "epochs", "seconds", "total_seconds"),
]
_MODEL = ("parameters", "embedding_parameters", "training_flops_per_token", "vocab_size")
_MODEL_AGAIN = "the run writes it again when it is next started"


class RunDirectory(LockedDirectory):
    """The directory of one run; making the object neither reads nor creates anything."""

    def __init__(self, path: str | Path):
        super().__init__(Path(path))

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    # Paths

    @property
    def name(self) -> str:
        """Return the name of the directory."""
        return self.path.name

    @property
    def config_file(self) -> Path:
        """Return the file of every setting of the run, defaults written out."""
        return self.path / CONFIG_FILE

    @property
    def environment_file(self) -> Path:
        """Return the file of versions, commit, command and hardware of the last start."""
        return self.path / "environment.json"

    @property
    def model_file(self) -> Path:
        """Return the file of parameters, FLOPs per token and size of the vocabulary."""
        return self.path / "model.json"

    @property
    def parent_file(self) -> Path:
        """Return the file of the run, and its step, that this run is a branch of."""
        return self.path / "parent.json"

    @property
    def metrics_file(self) -> Path:
        """Return the file of what was measured at a step, a JSON object per line."""
        return self.path / METRICS_FILE

    @property
    def wandb_file(self) -> Path:
        """Return the file that says which runs of Weights & Biases mirror this one."""
        return self.path / "wandb.json"

    @property
    def starts_file(self) -> Path:
        """Return the file of when the run was started, a JSON object per start."""
        return self.path / "starts.jsonl"

    @property
    def rolled_back_metrics_file(self) -> Path:
        """Return the file of the metrics of steps that a rollback undid."""
        return self.path / "metrics-rolled-back.jsonl"

    @property
    def blocks_file(self) -> Path:
        """Return the file of the statistics of blocks at a step, a JSON object per line."""
        return self.path / "blocks.jsonl"

    @property
    def log_file(self) -> Path:
        """Return the file of what was on the screen, with times."""
        return self.path / "log.txt"

    @property
    def failure_file(self) -> Path:
        """Return the file of the traceback of the process that ended the others."""
        return self.path / "failure.txt"

    @property
    def launch_file(self) -> Path:
        """Return the file of what ``python -m launch`` started, and how it ended."""
        return self.path / "launch.json"

    @property
    def launch_config_file(self) -> Path:
        """Return the file of the settings that ``python -m launch`` starts the run with."""
        return self.path / LAUNCH_CONFIG_FILE

    @property
    def output_file(self) -> Path:
        """Return the file of what the processes of a launched run print."""
        return self.path / "output.txt"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def evals(self) -> Path:
        """Return the folder of the results of evaluations, a JSON file each."""
        return self.path / "evals"

    @property
    def plots(self) -> Path:
        """Return the folder of the plots."""
        return self.path / "plots"

    @property
    def loss_plot(self) -> Path:
        """Return the file of the loss curve."""
        return self.plots / "loss.png"

    @property
    def tensorboard(self) -> Path:
        """Return the folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def profiles(self) -> Path:
        """Return the folder of torch.profiler's traces, one per process."""
        return self.path / "profiles"

    def replay_file(self, step: int) -> Path:
        """Return the file that repeats a step that was not finite."""
        return self.path / "replay" / f"step-{step}.pt"

    # Contents of the files

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of the metrics that are complete and have their step and tokens."""
        return _rows_of(self.metrics_file)

    def read_blocks(self) -> list[dict[str, Any]]:
        """Return the statistics of blocks, a row per step that has them; none without the file."""
        return _rows_of(self.blocks_file) if self.blocks_file.is_file() else []

    def measured_at(self, step: int) -> set[str]:
        """Return the names of what the metrics have of a step, null where it was not finite."""
        if not self.metrics_file.is_file():
            return set()
        rows = [row for row in self.read_metrics() if row["step"] == step]
        return {name for row in rows for name in row}

    def write_metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace the metrics by ``rows``."""
        _write_rows(self.metrics_file, rows)

    def write_blocks(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace the statistics of blocks by ``rows``."""
        _write_rows(self.blocks_file, rows)

    def read_config(self) -> RunConfig:
        """Return the settings of the run. Raises ConfigError where they are missing or damaged."""
        return load_saved_config(self.config_file)

    def write_config(self, config: RunConfig) -> None:
        """Write every setting of the run."""
        write_bytes(self.config_file, to_yaml(config).encode())

    def read_model(self) -> dict[str, Any]:
        """Return the sizes of the model; an empty dict where none were written.

        Raises UserError where the file is damaged.
        """
        if not self.model_file.exists():
            return {}
        try:
            values = json.loads(self.model_file.read_bytes())
        except ValueError as error:
            raise UserError(f"{self.model_file} is not JSON ({error}); {_MODEL_AGAIN}") from None
        numbers = values if isinstance(values, dict) else {}
        for name in _MODEL:
            if not isinstance(numbers.get(name), int | float):
                raise UserError(
                    f"{self.model_file} has no number '{name}', expected {', '.join(_MODEL)}; "
                    + _MODEL_AGAIN
                )
        return numbers

    def write_model(self, values: dict[str, Any]) -> None:
        """Write the sizes of the model."""
        write_json(self.model_file, values)

    def read_parent(self) -> dict[str, Any]:
        """Return what a branch noted of its trunk; an empty dict for a run that is no branch."""
        try:
            values = json.loads(self.parent_file.read_bytes())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def write_parent(self, values: dict[str, Any]) -> None:
        """Write what a branch begins from."""
        write_json(self.parent_file, values)

    def write_environment(self, values: dict[str, Any]) -> None:
        """Write what the run was started with."""
        write_json(self.environment_file, values)

    def read_launch(self) -> dict[str, Any]:
        """Return what the launcher noted; an empty dict where it noted nothing readable."""
        try:
            values = json.loads(self.launch_file.read_bytes())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def write_launch(self, **values: Any) -> None:
        """Add ``values`` to what the launcher noted."""
        write_json(self.launch_file, {**self.read_launch(), **values})

    def write_launch_config(self, config: RunConfig) -> None:
        """Create the directory, and in it the settings that the run is to be started with."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        write_bytes(self.launch_config_file, to_yaml(config).encode())

    def keep_saved_sizes(self, config: RunConfig) -> None:
        """Give mixers whose sizes ``config`` does not set those that this run was started with.

        Changes ``config``; does nothing for a run without a checkpoint.
        """
        checkpoint = self.last_checkpoint()
        if checkpoint is None:
            return
        if unchanged(checkpoint / CONFIG_FILE) is None:
            return  # loading the checkpoint reports what is wrong
        try:
            saved = load_saved_config(checkpoint / CONFIG_FILE)
        except ConfigError:
            return
        legacy.keep_saved_sizes(config.model, saved.model)

    def last_error(self) -> str:
        """Return the last line of the output that reports an error, or an empty string."""
        try:
            lines = self.output_file.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line for line in reversed(lines) if line.startswith("error: ")), "")

    def last_checkpoint(self) -> Path | None:
        """Return the latest checkpoint, or None where there is none yet."""
        return latest_in(self.checkpoints)

    def damage_of_latest(self) -> str | None:
        """Return what is wrong with the file that names the latest checkpoint, or None."""
        path = self.checkpoints / LATEST
        if not path.is_file() or marked_in(self.checkpoints) is not None:
            return None
        return f"{path} is damaged: it holds {path.read_bytes()[:20]!r}, expected a name: step-N"

    def describe_last_checkpoint(self) -> str:
        """Return a clause that names the latest checkpoint, for the end of a message."""
        found = self.last_checkpoint()
        return "there is no checkpoint yet" if found is None else f"the last checkpoint is {found}"


class Run(RunDirectory):
    """A run to look at, from a notebook: its metrics as a table, its settings as an object."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        if not self.config_file.is_file():
            raise UserError(
                f"{self.path} holds no run: there is no {CONFIG_FILE}; expected the directory of a "
                "run, such as runs/demo"
            )

    @property
    def metrics(self) -> pandas.DataFrame:
        """Return the metrics, a row per line, in order; NaN where a line lacks a name.

        Raises UserError where the run has not begun to train.
        """
        import pandas

        if not self.metrics_file.is_file():
            raise UserError(f"{self.path} has no {METRICS_FILE}, expected a run that has trained")
        rows = self.read_metrics()
        return pandas.DataFrame(rows, columns=None if rows else _COLUMNS)

    @property
    def config(self) -> RunConfig:
        """Return every setting of the run."""
        return self.read_config()


def overall_speed(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the tokens per second over all steps of a log, in order; None where none are known.

    The time is that of training alone: every line's speed is of the steps since the one before it.
    """
    tokens = seconds = 0.0
    for row in rows:
        if row.get("tokens_per_second") and row["tokens"] > tokens:
            seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
            tokens = row["tokens"]
    return tokens / seconds if seconds else None


def _rows_of(file: Path) -> list[dict[str, Any]]:
    rows = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and all(
            isinstance(row.get(key), int) for key in ("step", "tokens")
        ):
            rows.append(row)
    return rows


def _write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in finite_or_null(rows))
    write_bytes(file, text.encode())


# Folders of checkpoints


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that ``path`` means: itself, or the latest of a run's directory.

    Raises UserError where there is none.
    """
    if (path / FILES_FILE).is_file() or CHECKPOINT.fullmatch(path.name):
        if not path.is_dir():
            raise UserError(f"no checkpoint at {path}")
        return path
    for directory in (RunDirectory(path).checkpoints, path):
        found = latest_in(directory)
        if found is not None:
            return found
    runs = sorted(str(found.parent) for found in path.glob("*/checkpoints"))
    listed = f", such as {', '.join(runs[:3])}" if runs else ""
    raise UserError(
        f"no checkpoint at {path}: expected a run directory or one of its checkpoints/step-N"
        f"{listed}"
    )


def run_of_checkpoint(checkpoint: Path) -> RunDirectory:
    """Return the run directory that a checkpoint lies in."""
    return RunDirectory(checkpoint.parent.parent)
