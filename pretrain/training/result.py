"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.common.errors import EXIT_STOPPED
from pretrain.run_directory import RunDirectory

COMPLETED, STOPPED, NON_FINITE = "completed", "stopped", "non_finite"
EXIT_NON_FINITE = 3
_EXIT_STATUSES = {COMPLETED: 0, STOPPED: EXIT_STOPPED, NON_FINITE: EXIT_NON_FINITE}


@dataclass(frozen=True)
class TrainResult:
    """The outcome of :meth:`pretrain.training.trainer.Trainer.fit`.

    Attributes:
        status: ``completed``: the budget is done; ``stopped``: by a signal, saved, the same call
            continues; ``non_finite``: a loss or gradient was not finite, or spikes came back too
            often.
        step: Optimizer steps done since the run began.
        tokens: Tokens of those steps.
        loss: The loss of the last step that was done, in nats per token; None where no step was
            left to do.
    """

    status: str
    step: int
    tokens: int
    loss: float | None
    directory: RunDirectory

    @property
    def exit_status(self) -> int:
        """Return the exit status of the command: 0, 75 or 3."""
        return _EXIT_STATUSES[self.status]
