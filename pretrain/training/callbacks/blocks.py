"""Statistics of every block, every so many steps."""

from __future__ import annotations

from pretrain.training.block_statistics import BlockStatistics
from pretrain.training.callbacks.base import Callback, Decision


class LogBlocks(Callback):
    """Write a line of ``blocks.jsonl`` every ``logging.blocks`` steps."""

    _watched: BlockStatistics | None = None

    def before_step(self) -> None:
        """Begin to watch a step that is due."""
        trainer = self.trainer
        if (trainer.state.step + 1) % trainer.config.logging.blocks == 0:
            self._watched = BlockStatistics(trainer.engine, trainer.layer_metrics)
            self._watched.open()

    def after_decision(self, decision: Decision | None) -> None:
        """Write what was found, unless the step was rolled back."""
        watched, self._watched = self._watched, None
        if watched is None:
            return
        watched.close()
        rows, state = watched.rows(), self.trainer.state
        if decision is not Decision.ROLLED_BACK:
            self.trainer.log.blocks(state.step, state.tokens, rows)

    def on_exception(self, error: BaseException) -> None:
        """Leave the engine as it was."""
        if self._watched is not None:
            self._watched.close()
            self._watched = None
