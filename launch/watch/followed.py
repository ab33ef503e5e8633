"""One run that is followed: what its files say, read as they grow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from launch.commands import add_queue
from launch.grid import Member
from launch.members import DONE, FAILED, RUNNING, STOPPED, MemberState, stage_of
from launch.watch.alerts import BAD, WARNING, Alert, LogAlerts, LossAlerts, silence, worst_first
from launch.watch.curves import Curve
from launch.watch.tail import Tail
from pretrain.checkpoint_folders import checkpoint_step
from pretrain.common.errors import EXIT_STOPPED, UserError
from pretrain.config import RunConfig, load_saved_config
from pretrain.run_directory import RunDirectory
from pretrain.run_time import read_starts

_POSITIONS = ("step", "tokens", "hours")
TRAINED = (*_POSITIONS, "loss", "tokens_per_second")
VALIDATED = (*_POSITIONS, "valid_loss", "valid_bits_per_byte")
_NUMBERS = (*TRAINED, *VALIDATED, "loss_mean", "seconds", "total_seconds", "slowest_rank_ratio")
_SECONDS_BETWEEN_LOOKS = 20.0  # at a run of which no file has changed


class Metrics:
    """What the lines of ``metrics.jsonl`` come to."""

    def __init__(self) -> None:
        self.trained, self.validated = Curve(TRAINED), Curve(VALIDATED)
        self.losses = LossAlerts()
        self.last: dict[str, Any] = {}
        """The last line about a step."""
        self.last_validation: dict[str, Any] = {}
        self.longest_pause: float | None = None
        self.drawn: dict[str, Any] = {}
        """The points of the curves."""
        self._tokens, self._hours = 0, 0.0
        self.draw()

    def draw(self) -> None:
        """Make the points of the curves from all lines so far."""
        self.drawn = {"trained": self.trained.points(), "validated": self.validated.points()}

    def add(self, line: str) -> None:
        """Add a line; what is none about a step or a validation is passed over."""
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict) or any(
            not isinstance(row.get(k), int) for k in ("step", "tokens")
        ):
            return
        if not all(isinstance(row.get(name), int | float | None) for name in _NUMBERS):
            return
        if "loss" in row:
            self._add_step(row)
        elif row.get("valid_loss") is not None:
            self.last_validation = row
            self.validated.add({**row, "hours": self._hours}, {})

    def _add_step(self, row: dict[str, Any]) -> None:
        seconds, before = row.get("seconds"), self.last.get("seconds")
        if seconds is not None and before is not None and seconds >= before:
            self.longest_pause = max(self.longest_pause or 0.0, seconds - before)
        total = row.get("total_seconds", seconds)
        if total is not None:
            self._hours = total / 3600
        new, self._tokens = row["tokens"] - self._tokens, row["tokens"]
        speed = row.get("tokens_per_second") or None
        values = {
            **{name: row.get(name) for name in TRAINED},
            "hours": self._hours,
            "loss": row.get("loss_mean", row["loss"]),
            "tokens_per_second": speed if new > 0 else None,
        }
        weights = dict.fromkeys(TRAINED, float(max(new, 1)))
        if speed:
            weights["tokens_per_second"] = new / speed  # the mean over time
        self.trained.add(values, weights)
        self.losses.add(row)
        self.last = row


class FollowedRun:
    """A run directory, looked at again and again; ``version`` is that of what it told last."""

    def __init__(self, directory: RunDirectory, name: str, group: str):
        self.directory, self.name, self.group = directory, name, group
        self.version = 0
        self.told: dict[str, Any] = {}
        """What the page shows of the run."""
        self._metrics_file = Tail(directory.metrics_file)
        self._log_file = Tail(directory.log_file)
        self._metrics, self._log = Metrics(), LogAlerts()
        self._config: RunConfig | None = None
        self._unreadable = ""
        self._stamps: dict[Path, int] = {}
        self._stage, self._start, self._saved = ("", ""), "", -1
        self._looked = 0.0

    @property
    def member(self) -> Member | None:
        """Return the run as a grid's member, for Slurm's queue; None without readable settings."""
        return None if self._config is None else Member(self.name, {}, self._config)

    def refresh(self, queue: dict[str, tuple[str, str]]) -> bool:
        """Read what is new; return whether that changes what is told.

        ``queue`` is Slurm's, by name of the run.
        """
        grown = self._read_lines()
        now = time.time()
        directory = self.directory
        # Lists: every file is looked at, so that each is compared with its last look.
        settings = [self._changed(f) for f in (directory.config_file, directory.launch_config_file)]
        others = (directory.launch_file, directory.starts_file, directory.failure_file)
        noted = [self._changed(path) for path in (*others, directory.checkpoints)]
        held = self._stage[0] == RUNNING or directory.is_locked()
        if any(settings):
            self._read_settings()
        if any(noted):
            self._read_start()
        # To see that a run is done may take reading all its metrics.
        due = self._stage[0] != DONE and now - self._looked > _SECONDS_BETWEEN_LOOKS
        if grown or held or due or any(settings + noted):
            self._looked = now
            self._look_at_stage()
        told = self._tell(queue)
        changed = told != self.told
        self.told = told
        return changed

    def _read_lines(self) -> bool:
        grown, replaced = self._metrics_file.look()
        if replaced:
            self._metrics = Metrics()
        if grown:
            for line in self._metrics_file.lines():
                self._metrics.add(line)
        if grown or replaced:
            self._metrics.draw()
        more, replaced = self._log_file.look()
        if replaced:
            self._log = LogAlerts()
        if more:
            for line in self._log_file.lines():
                self._log.add(line)
        return grown or more

    def _changed(self, path: Path) -> bool:
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            stamp = 0
        before, self._stamps[path] = self._stamps.get(path), stamp
        return before != stamp

    def _read_settings(self) -> None:
        files = (self.directory.config_file, self.directory.launch_config_file)
        path = next((file for file in files if file.is_file()), files[0])
        try:
            self._config, self._unreadable = load_saved_config(path), ""
            self._config.directory = str(self.directory)  # it may have been moved
        except UserError as error:
            self._config, self._unreadable = None, str(error)

    def _read_start(self) -> None:
        starts = read_starts(self.directory)
        self._start = str(starts[-1].get("time", ""))[:19] if starts else ""
        saved = self.directory.last_checkpoint()
        self._saved = -1 if saved is None else checkpoint_step(saved)

    def _look_at_stage(self) -> None:
        if self._config is not None:
            self._stage = stage_of(self._config, self._metrics.last.get("step", 0))
        else:
            self._stage = (RUNNING if self.directory.is_locked() else STOPPED), ""

    def _tell(self, queue: dict[str, tuple[str, str]]) -> dict[str, Any]:
        metrics, config = self._metrics, self._config
        last, validation = metrics.last, metrics.last_validation
        state = MemberState(*self._stage[:1], step=last.get("step", 0), reason=self._stage[1])
        state.tokens_per_second = metrics.trained.mean("tokens_per_second")
        if config is not None:
            mine = {self.name: queue[self.name]} if self.name in queue else {}
            add_queue({self.name: state}, [Member(self.name, {}, config)], mine)
        left = None
        if config is not None and state.state == RUNNING:
            left = state.seconds_left(config)
        written = max(self._metrics_file.written or 0.0, self._log_file.written or 0.0)
        return {
            "name": self.name,
            "group": self.group,
            "state": state.state,
            "reason": state.reason,
            "step": state.step,
            "steps": None if config is None else config.plan.num_steps,
            "loss": last.get("loss_mean", last.get("loss")),
            "valid_loss": validation.get("valid_loss"),
            "valid_bits_per_byte": validation.get("valid_bits_per_byte"),
            "tokens_per_second": last.get("tokens_per_second"),
            "goodput": last.get("goodput"),
            "seconds_left": left,
            "written": written or None,
            "alerts": [alert.described() for alert in worst_first(self._alerts(state))],
            **metrics.drawn,
        }

    def _alerts(self, state: MemberState) -> list[Alert]:
        metrics, found = self._metrics, list[Alert]()
        if self._unreadable:
            found.append(Alert(WARNING, self._unreadable))
        failure = self._failure(state)
        found += [] if failure is None else [failure]
        ratio = metrics.last.get("slowest_rank_ratio")
        said = self._log.since(self._start, saved=self._saved, ratio=ratio)
        found += said
        if all(alert.level != BAD for alert in said):  # those say more of it
            found += metrics.losses.alerts()
        written = max(self._metrics_file.written or 0.0, self._log_file.written or 0.0)
        if state.state == RUNNING and written:
            quiet = silence(written, metrics.longest_pause)
            found += [] if quiet is None else [quiet]
        return found

    def _failure(self, state: MemberState) -> Alert | None:
        """Return why the run failed, or that it ended without having been asked to."""
        if state.state == FAILED:
            reason = (state.reason or "its output says why").removeprefix("error: ")
            return Alert(BAD, f"failed: {reason}")
        if state.state != STOPPED or not self._start:
            return None
        file = self.directory.failure_file
        written = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(_written(file)))
        if written >= self._start:
            first = file.read_text(errors="replace").partition("\n")[0]
            return Alert(BAD, f"failed: {first}")
        asked = self.directory.read_launch().get("status") == EXIT_STOPPED
        if asked or self._log.stopped >= self._start:
            return None
        return Alert(
            WARNING,
            f"ended after step {state.step:,}, and its log does not say why; the same command "
            "resumes it",
        )


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
