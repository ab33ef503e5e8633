"""The phases of a run in its log and metrics."""

from __future__ import annotations

from pretrain.config.plan import RunPlan
from pretrain.training.callbacks.base import Callback


class MarkPhases(Callback):
    """Mark where each phase begins, and the phase of every logged step.

    The line of the metrics about a border has the last step before it (0 for the first phase), and
    the number and name of the phase that begins: ``phase_begins`` and ``phase_name``.
    """

    def on_train_start(self) -> None:
        """Mark the first phase, and a border whose mark a kill has cost."""
        if "phase_begins" not in self.trainer.measured():
            self._mark()

    def on_log(self, metrics: dict[str, float | None]) -> None:
        """Add the number of the phase that the step belongs to."""
        metrics["phase"] = self.trainer.plan.phase_at(self.trainer.state.step - 1).number

    def between_steps(self) -> None:
        """Mark the phase that begins with the next step."""
        self._mark()

    def _mark(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        phase = trainer.plan.phase_at(state.step)
        if phase.first != state.step:
            return
        trainer.log.record(
            {
                "step": state.step,
                "tokens": state.tokens,
                "phase_begins": phase.number,
                "phase_name": phase.name,
            }
        )
        trainer.log.say(f"step {state.step}: {_describe(trainer.plan, phase.number)}")


def _describe(plan: RunPlan, number: int) -> str:
    phase = plan.phases[number - 1]
    train = phase.config.train
    first, last = (f"{plan.learning_rate(s):.3g}" for s in (phase.first, phase.last - 1))
    return (
        f"{phase.name} begins, {number} of {len(plan.phases)}: {phase.steps:,} steps of "
        f"{train.global_batch_tokens:,} tokens in sequences of {train.seq_len:,}, learning rate "
        f"{first if first == last else f'{first} to {last}'}"
    )
