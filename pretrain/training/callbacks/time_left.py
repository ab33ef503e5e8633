"""The time that a run will take, told as soon as a start has measured it."""

from __future__ import annotations

import time

from pretrain.common.text import duration
from pretrain.training.callbacks.base import Callback, Decision
from pretrain.training.engine import StepResult

_FIRST_STEPS = 3  # of a start, of which the first is not timed: it sets up what the others reuse


class TellTimeLeft(Callback):
    """Say how long the run will take after the first steps, where no line of the log does yet."""

    def on_train_start(self) -> None:
        """Note where this start begins."""
        self._start, self._first_step = self.trainer.state.step, time.monotonic()

    def after_step(self, result: StepResult) -> Decision | None:
        """Time the first steps; never decide."""
        step, every = self.trainer.state.step, self.trainer.config.logging.every
        if step == self._start + 1:
            self._first_step = time.monotonic()
        elif step == self._start + _FIRST_STEPS and step // every == self._start // every:
            self._tell()
        return None

    def _tell(self) -> None:
        trainer, plan = self.trainer, self.trainer.plan
        done = plan.tokens_before(trainer.state.step)
        left = plan.tokens - done
        if left <= 0:
            return
        seconds = max(time.monotonic() - self._first_step, 1e-9)
        speed = (done - plan.tokens_before(self._start + 1)) / seconds
        trainer.log.say(
            f"about {duration(left / speed)} left, at the {speed:,.0f} tokens/s of the first steps"
        )
