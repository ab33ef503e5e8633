"""Reactions to a sudden rise of the loss: skip the step, or roll back to before it."""

from __future__ import annotations

import math

from pretrain.training.callbacks.base import Callback, Decision
from pretrain.training.engine import StepResult
from pretrain.training.spikes import SpikeDetector, roll_back


class SkipSpikes(Callback):
    """Skip the update of a step whose loss is a spike."""

    def on_train_start(self) -> None:
        """Set up the detector."""
        trainer = self.trainer
        self._detector = SpikeDetector(trainer.config.train.spikes, trainer.state.recent_losses)

    def skip_update(self, loss: float) -> bool:
        """Return whether the loss is a spike."""
        return self._detector.is_spike(loss)

    def after_step(self, result: StepResult) -> Decision | None:
        """Report a skipped spike; never decide."""
        if not math.isfinite(result.loss):
            return None
        spike = self._detector.is_spike(result.loss)
        self._detector.add(result.loss)
        if spike:
            state, log = self.trainer.state, self.trainer.log
            log.record(
                {
                    "step": state.step,
                    "tokens": state.tokens,
                    "skipped": state.skipped,
                    "spike": result.loss,
                }
            )
            log.say(
                f"step {state.step}: loss {result.loss:.4f} is a spike, skipped "
                f"({state.skipped} steps so far)"
            )
        return None


class RollBackSpikes(Callback):
    """Go back to a checkpoint before a spike, and continue from there with other data."""

    def on_train_start(self) -> None:
        """Set up the detector."""
        trainer = self.trainer
        self._detector = SpikeDetector(trainer.config.train.spikes, trainer.state.recent_losses)

    def after_step(self, result: StepResult) -> Decision | None:
        """Roll back after a spike; give up after too many."""
        if not math.isfinite(result.loss):
            return None
        if not self._detector.is_spike(result.loss):
            self._detector.add(result.loss)
            return None
        with self.trainer.paused(f"rolling back from step {self.trainer.state.step}"):
            return self._roll_back(result.loss)

    def _roll_back(self, loss: float) -> Decision | None:
        trainer, state, log = self.trainer, self.trainer.state, self.trainer.log
        spike, spikes = state.step, trainer.config.train.spikes
        trainer.writer.wait()
        log.say(
            f"step {spike}: loss {loss:.4f} is a spike above {min(state.recent_losses):.4f} to "
            f"{max(state.recent_losses):.4f}"
        )
        if state.rollbacks == spikes.most:
            log.say(
                f"rolled back {spikes.most} times already (train.spikes.most), stopped; "
                f"{trainer.run_directory.describe_last_checkpoint()}"
            )
            return Decision.GIVE_UP
        found = roll_back(trainer.config, trainer.engine, trainer.writer.directory, state)
        if found is None:
            log.say(f"no checkpoint is {spikes.rollback_steps} steps older; continuing")
            self._detector.add(loss)
            return None
        trainer.forget_metrics()
        trainer.wall_time.undo_steps(spike - state.step)
        # Saved, so that the data is skipped even if the run is killed now.
        trainer.writer.save(trainer.engine, state)
        log.rewind(state.step)
        log.record(
            {
                "step": state.step,
                "tokens": state.tokens,
                "rolled_back_from": spike,
                "data_offset": state.data_offset,
            }
        )
        log.say(
            f"rolled back to step {state.step}, skipping the data up to the spike and of "
            f"{spikes.skip_steps} steps more"
        )
        return Decision.ROLLED_BACK
