"""The end of a run, or a skipped step, where a loss or gradient is not finite."""

from __future__ import annotations

import math

from pretrain.training.callbacks.base import Callback, Decision
from pretrain.training.engine import StepResult

_MAX_SKIPS = 20


class StopNonFinite(Callback):
    """Stop the run at steps that are not finite.

    The first one ends it, or, where ``train.nonfinite`` is ``skip``, 20 of them in a row.
    """

    _in_a_row = 0

    def after_step(self, result: StepResult) -> Decision | None:
        """Report a step that is not finite, and decide whether the run ends."""
        if result.applied:
            self._in_a_row = 0
            return None
        if result.grad_norm is None and math.isfinite(result.loss):
            return None  # a callback had it skipped
        trainer, state, log = self.trainer, self.trainer.state, self.trainer.log
        log.record({"step": state.step, "tokens": state.tokens, "skipped": state.skipped})
        self._in_a_row += 1
        if trainer.config.train.nonfinite == "stop":
            trainer.writer.wait()  # the last checkpoint shall be complete, and named
            log.say(
                f"step {state.step}: loss {result.loss}, gradient norm {result.grad_norm}: not "
                "finite, stopped without updating (train.nonfinite=skip skips such steps); "
                f"{trainer.run_directory.describe_last_checkpoint()}"
            )
            return Decision.GIVE_UP
        if self._in_a_row == _MAX_SKIPS:
            trainer.writer.wait()
        log.say(f"step {state.step}: not finite, skipped ({state.skipped} so far)")
        if self._in_a_row < _MAX_SKIPS:
            return None
        log.say(
            f"{_MAX_SKIPS} steps in a row were not finite, stopped; "
            f"{trainer.run_directory.describe_last_checkpoint()}"
        )
        return Decision.GIVE_UP
