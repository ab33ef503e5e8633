"""The lines of the log that say how training advances."""

from __future__ import annotations

from pretrain.parallel.processes import all_reduce_metrics, first_of_pipeline, world_size
from pretrain.training.callbacks.base import Callback, Decision
from pretrain.training.engine import StepResult
from pretrain.training.metrics import peak_flops, peak_memory_bytes


class LogSteps(Callback):
    """Log every ``logging.every`` steps, and the last one, unless it was skipped or rolled back."""

    def on_train_start(self) -> None:
        """Look up the device's peak."""
        self._peak = peak_flops(self.trainer.config.train.precision)
        self._metrics: dict[str, float | None] | None = None

    def after_step(self, result: StepResult) -> Decision | None:
        """Measure the step if it is due; never decide."""
        trainer, step = self.trainer, self.trainer.state.step
        due = step % trainer.config.logging.every == 0 or step == trainer.num_steps
        self._metrics = self._measure(result) if result.applied and due else None
        return None

    def after_decision(self, decision: Decision | None) -> None:
        """Log what was measured, once every callback has seen the step."""
        trainer, metrics, self._metrics = self.trainer, self._metrics, None
        if metrics is None or decision is Decision.ROLLED_BACK:
            return
        for callback in trainer.callbacks:
            callback.on_log(metrics)
        tokens_left = trainer.config.train.tokens_before(trainer.num_steps) - trainer.state.tokens
        trainer.log.step(metrics, seconds_left=tokens_left / self._speed)

    def _measure(self, result: StepResult) -> dict[str, float | None]:
        trainer, state = self.trainer, self.trainer.state
        self._speed = trainer.interval.tokens_per_second()
        trainer.layer_metrics.collect(trainer.engine)
        local = {**trainer.layer_metrics.take(), "memory_max": float(peak_memory_bytes())}
        layers = all_reduce_metrics(local)
        memory = int(layers.pop("memory_max"))
        recursion = first_of_pipeline(trainer.engine.recursion_metrics())
        if layers.get("newton_fallbacks"):
            trainer.log.say(
                f"step {state.step}: Newton's method did not converge on "
                f"{layers['newton_fallbacks']:g} sequences, which were computed step by step"
            )
        epochs = trainer.batches.epochs(state.step, offset=state.data_offset)
        return {
            "step": state.step,
            "tokens": state.tokens,
            "loss": result.loss,
            "lr": trainer.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": self._speed,
            **self._utilization(recursion.get("recurrences")),
            "memory": memory,
            "skipped": state.skipped,
            "epochs": max(epochs),
            "seconds": trainer.seconds(),
            **recursion,
            **layers,
        }

    def _utilization(self, recurrences: float | None) -> dict[str, float | None]:
        """Return the shares of the peak that the model's FLOPs, and the hardware's, are."""
        counts, train = self.trainer.counts, self.trainer.config.train
        flops_per_token = {"mfu": counts.training_flops(recurrences)}
        if train.activation_checkpointing == "block":
            flops_per_token["hfu"] = counts.hardware_flops(recurrences)
        if self._peak is None:
            return dict.fromkeys(flops_per_token)
        peak = self._peak * world_size()
        return {name: flops * self._speed / peak for name, flops in flops_per_token.items()}
