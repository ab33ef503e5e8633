"""The rows that carry states from step to step, where a phase deals them anew."""

from __future__ import annotations

from pretrain.training.callbacks.base import Callback
from pretrain.training.setup import carry_states


class CarryStates(Callback):
    """Have rows begin without states where other rows begin, in number, length or text."""

    def on_train_start(self) -> None:
        """Note of which rows the states are that the engine has loaded."""
        self._rows = self._rows_of(max(self.trainer.state.step - 1, 0))

    def before_step(self) -> None:
        """Deal rows anew where those of the step are others than those of the step before."""
        trainer, step = self.trainer, self.trainer.state.step
        rows = self._rows_of(step)
        if rows == self._rows:
            return
        self._rows = rows
        carry_states(trainer.engine.parts, trainer.plan.phase_at(step).config)
        trainer.log.say(
            f"step {step}: rows are dealt anew and begin without the states that they carried"
        )

    def _rows_of(self, step: int) -> tuple[int, int]:
        """Return which rows a step has, and how they are divided."""
        phase = self.trainer.plan.phase_at(step).config
        return self.trainer.batches.mix_at(step).first, phase.parallel.micro_batch_size
