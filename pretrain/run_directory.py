"""The directory of a run: the names and formats of its files, its lock, its checkpoints.

Nothing here needs torch: whoever launches or reports runs reads them without it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes, write_json
from pretrain.config import ConfigError, RunConfig, legacy, load_saved_config, to_yaml

if TYPE_CHECKING:
    import pandas

CONFIG_FILE = "config.yaml"  # of a run, and of each of its checkpoints
METRICS_FILE = "metrics.jsonl"
_COLUMNS = [  # of the metrics of every run
    *("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu"),
    *("memory", "skipped", "epochs", "seconds"),
]
_MODEL = ("parameters", "embedding_parameters", "training_flops_per_token", "vocab_size")
_MODEL_AGAIN = "the run writes it again when it is next started"
_CHECKPOINT = re.compile(r"step-(\d{8,})")
_LATEST = "latest"
_PROBE_SECONDS = 1.0  # longer than any is_locked holds the lock


class RunDirectory:
    """The directory of one run; making the object neither reads nor creates anything."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock_handle: int | None = None

    @classmethod
    def find_below(cls, folder: Path) -> list[RunDirectory]:
        """Return every run at or below ``folder`` that has metrics, ordered by path."""
        return [cls(path.parent) for path in sorted(folder.rglob(METRICS_FILE))]

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
    def metrics_file(self) -> Path:
        """Return the file of what was measured at a step, a JSON object per line."""
        return self.path / METRICS_FILE

    @property
    def rolled_back_metrics_file(self) -> Path:
        """Return the file of the metrics of steps that a rollback undid."""
        return self.path / "metrics-rolled-back.jsonl"

    @property
    def log_file(self) -> Path:
        """Return the file of what was on the screen, with times."""
        return self.path / "log.txt"

    @property
    def failure_file(self) -> Path:
        """Return the file of the traceback of the process that ended the others."""
        return self.path / "failure.txt"

    @property
    def lock_file(self) -> Path:
        """Return the file that the process that trains in here holds locked."""
        return self.path / ".lock"

    @property
    def launch_file(self) -> Path:
        """Return the file of what ``python -m launch`` started, and how it ended."""
        return self.path / "launch.json"

    @property
    def launch_config_file(self) -> Path:
        """Return the file of the settings that ``python -m launch`` starts the run with."""
        return self.path / "launch.yaml"

    @property
    def output_file(self) -> Path:
        """Return the file of what the processes of a launched run print."""
        return self.path / "output.txt"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / "checkpoints"

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

    # Contents of the files

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of the metrics that are complete and have their step and tokens."""
        rows = []
        for line in self.metrics_file.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and all(
                isinstance(row.get(key), int) for key in ("step", "tokens")
            ):
                rows.append(row)
        return rows

    def write_metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace the metrics by ``rows``."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_bytes(self.metrics_file, text.encode())

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
        try:
            saved = load_saved_config(checkpoint / CONFIG_FILE)
        except ConfigError:
            return  # loading the checkpoint reports what is wrong
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
        return _latest_in(self.checkpoints)

    def describe_last_checkpoint(self) -> str:
        """Return a clause that names the latest checkpoint, for the end of a message."""
        found = self.last_checkpoint()
        return "there is no checkpoint yet" if found is None else f"the last checkpoint is {found}"

    # The lock

    def take_lock(self) -> None:
        """Create the directory and hold it: one run trains in a directory at a time.

        The system releases the lock when the process ends, however it ends. Raises UserError where
        the directory cannot be written to or another run holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_handle = os.open(self.lock_file, os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise self._unwritable(error) from None
        until = time.monotonic() + _PROBE_SECONDS
        while True:
            try:
                fcntl.flock(self._lock_handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() < until:  # it may be is_locked of another process
                    time.sleep(0.005)
                    continue
                self.release_lock()
                raise UserError(
                    f"another process is training in {self.path}: wait for it, or choose another "
                    "name"
                ) from None
            except OSError:  # a file system without locks: nothing to hold
                return

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write to the run directory {self.path}: {error.strerror}")

    def release_lock(self) -> None:
        """Unlock the directory for another run; nothing happens where the lock is not held."""
        if self._lock_handle is not None:
            os.close(self._lock_handle)
            self._lock_handle = None

    def is_locked(self) -> bool:
        """Return whether a process trains in here.

        A process on another machine is not seen where the file system has no locks.
        """
        try:
            handle = os.open(self.lock_file, os.O_RDWR)
        except OSError:
            return False
        try:
            # Shared, so that those who ask do not see each other; take_lock waits for them.
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(handle)
        return False


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


# Folders of checkpoints


def checkpoint_name(step: int) -> str:
    """Return the name of the folder that holds the checkpoint of ``step``."""
    return f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """Return the step that the name of a checkpoint's folder says."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in ``directory``, newest first."""
    named = (p for p in directory.glob("step-*") if _CHECKPOINT.fullmatch(p.name))
    return sorted((p for p in named if p.is_dir()), reverse=True)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that ``path`` means: itself, or the latest of a run's directory.

    Raises UserError where there is none.
    """
    if (path / "files.json").is_file() or _CHECKPOINT.fullmatch(path.name):
        if not path.is_dir():
            raise UserError(f"no checkpoint at {path}")
        return path
    for directory in (RunDirectory(path).checkpoints, path):
        found = _latest_in(directory)
        if found is not None:
            return found
    raise UserError(
        f"no checkpoint at {path}: expected a run directory or one of its checkpoints/step-N"
    )


def run_of_checkpoint(checkpoint: Path) -> RunDirectory:
    """Return the run directory that a checkpoint lies in."""
    return RunDirectory(checkpoint.parent.parent)


def mark_latest(checkpoint: Path) -> None:
    """Make ``checkpoint`` the one that its run continues from."""
    write_bytes(checkpoint.parent / _LATEST, checkpoint.name.encode())


def _latest_in(directory: Path) -> Path | None:
    latest = directory / _LATEST
    if latest.is_file():
        marked = directory / latest.read_text().strip()
        if marked.is_dir():
            return marked
    found = list_checkpoints(directory) if directory.is_dir() else []
    return found[0] if found else None
