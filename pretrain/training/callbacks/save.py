"""Checkpoints on the way."""

from __future__ import annotations

import time
from pathlib import Path

from pretrain.parallel.processes import on_main_process
from pretrain.training.callbacks.base import Callback

_PAUSE = 10.0  # seconds before the last save is tried again, twice as long each time


class Save(Callback):
    """Save every ``checkpoint.every`` steps, where ``checkpoint.keep`` says, and at the end.

    Also before the run stops.
    """

    def on_train_start(self) -> None:
        """Look up the steps to keep."""
        self._kept = self.trainer.config.kept_steps

    def between_steps(self) -> None:
        """Begin a checkpoint if one is due.

        Raises UserError where more than ``checkpoint.retries`` in a row have failed.
        """
        trainer, step = self.trainer, self.trainer.state.step
        due = step % trainer.config.checkpoint.every == 0 or step in self._kept
        if due or trainer.stopping or step == trainer.num_steps:
            self._save()
        trainer.writer.check()

    def on_stop(self) -> None:
        """Wait for the checkpoint and say how to resume."""
        trainer = self.trainer
        trainer.log.say(
            f"stopped by {trainer.stop.name} after step {trainer.state.step}, saved "
            f"{self._finish()}; run the same command again to resume"
        )

    def on_complete(self) -> None:
        """Wait for the last checkpoint."""
        with self.trainer.paused("finishing", "save"):
            self._finish()

    def _save(self) -> None:
        trainer = self.trainer
        with trainer.paused(f"saving step {trainer.state.step}", "save"):
            trainer.writer.wait()
            unreachable = on_main_process(trainer.run_directory.why_unreachable)
            if unreachable is not None:
                trainer.writer.count_failure(unreachable)
            else:
                trainer.writer.save(trainer.engine, trainer.state)
                for callback in trainer.callbacks:
                    callback.after_save()
            on_main_process(trainer.log.write_held)

    def _finish(self) -> Path | None:
        """Wait for the last checkpoint, and save it again, some seconds later, where it failed."""
        trainer, pause = self.trainer, _PAUSE
        saved = trainer.writer.wait()
        while trainer.writer.failures:
            trainer.log.say(f"saving step {trainer.state.step} again in {pause:g} seconds")
            with trainer.paused("waiting to save again", "save"):
                time.sleep(pause)
            pause *= 2
            self._save()
            saved = trainer.writer.wait()
        return saved
