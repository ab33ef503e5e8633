"""The base class of callbacks, and what they may decide about a step."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from pretrain.training.engine import StepResult

if TYPE_CHECKING:
    from pretrain.training.result import TrainResult
    from pretrain.training.trainer import Trainer


class Decision(enum.Enum):
    """The course of the loop after a step, taken from the first callback that decides at all."""

    ROLLED_BACK = "rolled back"
    """``trainer.state`` is that of an earlier step, from where the loop continues at once."""
    GIVE_UP = "give up"
    """The run ends without saving, with the status ``non_finite``."""


class Callback:
    """Base of what happens beside the steps of a run; subclasses override the hooks they need.

    Every process has its own callbacks and calls every hook, so a hook may communicate with the
    same hook of the other processes. An event calls its hook of all callbacks, in the order of
    ``trainer.callbacks``, before the next event begins; :meth:`on_exception` is called in the
    opposite order. Two events happen within another one: :meth:`on_log` within the
    :meth:`after_decision` of ``LogSteps``, and :meth:`after_save` within the :meth:`between_steps`
    of ``Save``. What a hook raises ends the run.
    """

    trainer: Trainer
    """The trainer that the callback belongs to, set before the first hook of a fit is called."""

    def on_fit_start(self) -> None:
        """Begin: the processes have met, nothing is built yet."""

    def on_train_start(self) -> None:
        """Prepare for the loop: the engine is built and loaded, and the log is open."""

    def on_resume(self) -> None:
        """Make up for what was due after step ``trainer.state.step`` but was cut off.

        Called before the first step of a run that continues from a checkpoint, and where no step is
        left.
        """

    def on_work(self, work: str) -> None:
        """Hear what this process does from now on, in words that fit after "it has been at"."""

    def on_progress(self) -> None:
        """Hear that the work at hand, which may take long, advances."""

    def before_step(self) -> None:
        """Act before step ``trainer.state.step + 1``, whose random numbers are seeded later."""

    def skip_update(self, loss: float) -> bool:
        """Return whether the update of a step with this loss, in nats per token, is skipped.

        Every process must return the same. Not available with DeepSpeed.
        """
        return False

    def after_step(self, result: StepResult) -> Decision | None:
        """Look at the step that was done last, ``trainer.state.step``; may decide what follows.

        Callbacks after the one that decides are not asked.
        """
        return None

    def after_decision(self, decision: Decision | None) -> None:
        """Act when :meth:`after_step` of every callback was called, or one of them decided."""

    def on_log(self, metrics: dict[str, float | None]) -> None:
        """Add to the metrics that are about to be logged for the step that was done last.

        Called after every :meth:`after_step` of the step, before any :meth:`between_steps`; not for
        a step that was rolled back.
        """

    def between_steps(self) -> None:
        """Act after a step that was not rolled back; ``trainer.stopping``: it is the last one."""

    def after_save(self) -> None:
        """Act after a checkpoint of ``trainer.state`` was begun (it may be written meanwhile).

        Called before the :meth:`between_steps` of the callbacks that come after ``Save``, such as
        those of users.
        """

    def on_stop(self) -> None:
        """Act after a signal, or a request, has stopped the run and it has been saved."""

    def on_complete(self) -> None:
        """Act after the last step of the run."""

    def on_fit_end(self, result: TrainResult) -> None:
        """Finish: the run has ended, in whichever way ``result`` says."""

    def on_exception(self, error: BaseException) -> None:
        """Finish: ``error`` ends the run."""
