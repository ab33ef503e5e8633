"""Checkpoints on the way."""

from __future__ import annotations

from pretrain.parallel.processes import is_main_process
from pretrain.training.callbacks.base import Callback


class Save(Callback):
    """Save every ``checkpoint.every`` steps, where ``checkpoint.keep`` says, and at the end.

    Also before the run stops.
    """

    def on_train_start(self) -> None:
        """Look up the steps to keep."""
        self._kept = self.trainer.config.kept_steps

    def between_steps(self) -> None:
        """Begin a checkpoint if one is due, and raise UserError where the last one failed.

        Also where the run directory has been removed meanwhile.
        """
        trainer, step = self.trainer, self.trainer.state.step
        due = step % trainer.config.checkpoint.every == 0 or step in self._kept
        if due or trainer.stopping or step == trainer.num_steps:
            if is_main_process():
                trainer.run_directory.check_held()
            with trainer.paused(f"saving step {step}"):
                trainer.writer.save(trainer.engine, trainer.state)
                for callback in trainer.callbacks:
                    callback.after_save()
        trainer.writer.check()

    def on_stop(self) -> None:
        """Wait for the checkpoint and say how to resume."""
        trainer = self.trainer
        trainer.log.say(
            f"stopped by {trainer.stop.name} after step {trainer.state.step}, saved "
            f"{trainer.writer.wait()}; run the same command again to resume"
        )

    def on_complete(self) -> None:
        """Wait for the last checkpoint."""
        self.trainer.announce("finishing")
        self.trainer.writer.wait()
