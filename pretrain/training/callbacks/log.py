"""The lines of the log that say how training advances."""

from __future__ import annotations

from pretrain.checkpoint.teacher import count_run
from pretrain.model.distillation import mean_metrics
from pretrain.parallel.processes import all_reduce_metrics, first_of_pipeline, world_size
from pretrain.training.callbacks.base import Callback, Decision
from pretrain.training.engine import StepResult
from pretrain.training.metrics import peak_flops, peak_memory_bytes


class LogSteps(Callback):
    """Log every ``logging.every`` steps, and the last one, unless it was skipped or rolled back.

    Beside the step's loss it logs the mean, by tokens, over all steps since the last line whose
    update was applied.
    """

    def on_train_start(self) -> None:
        """Look up the device's peak."""
        self._peak = peak_flops(self.trainer.config.train.precision)
        self._metrics: dict[str, float | None] | None = None
        self._counts = {self.trainer.config.train.seq_len: self.trainer.counts}

    def after_step(self, result: StepResult) -> Decision | None:
        """Measure the step if it is due; never decide."""
        trainer, state, step = self.trainer, self.trainer.state, self.trainer.state.step
        if result.applied:
            batch = trainer.plan.batch_tokens(step - 1)
            weight = batch / trainer.config.train.global_batch_tokens
            state.unlogged_loss += result.loss * weight
            state.unlogged_steps += weight
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
        tokens_left = trainer.plan.tokens - trainer.state.tokens
        trainer.log.step(metrics, seconds_left=tokens_left / self._speed)

    def _measure(self, result: StepResult) -> dict[str, float | None]:
        trainer, state = self.trainer, self.trainer.state
        self._speed = trainer.interval.tokens_per_second()
        trainer.layer_metrics.collect(trainer.engine)
        local = {**trainer.layer_metrics.take(), "memory_max": float(peak_memory_bytes())}
        with trainer.wall_time.spent_on("wait"):
            layers = all_reduce_metrics(local)
            recursion = first_of_pipeline(trainer.engine.recursion_metrics())
        mean_metrics(layers)
        memory = int(layers.pop("memory_max"))
        if layers.get("newton_fallbacks"):
            trainer.log.say(
                f"step {state.step}: Newton's method did not converge on "
                f"{layers['newton_fallbacks']:g} sequences, which were computed step by step"
            )
        mean = state.unlogged_loss / state.unlogged_steps
        state.unlogged_loss = state.unlogged_steps = 0.0
        epochs = trainer.batches.epochs(state.step, offset=state.offset)
        return {
            "step": state.step,
            "tokens": state.tokens,
            "loss": result.loss,
            "loss_mean": mean,
            **({} if result.masked_loss is None else {"masked_loss": result.masked_loss}),
            "lr": trainer.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": self._speed,
            **self._utilization(recursion.get("recurrences")),
            "memory": memory,
            "skipped": state.skipped,
            "epochs": max(epochs),
            "seconds": trainer.seconds(),
            "total_seconds": round(trainer.log.seconds_before + trainer.seconds(), 3),
            **trainer.wall_time.metrics(),
            **recursion,
            **layers,
        }

    def _utilization(self, recurrences: float | None) -> dict[str, float | None]:
        """Return the shares of the peak that the model's FLOPs, and the hardware's, are."""
        train = self.trainer.plan.phase_at(self.trainer.state.step - 1).config.train
        if train.seq_len not in self._counts:
            config, rows = self.trainer.config, self.trainer.state.vocab_size
            self._counts[train.seq_len] = count_run(config, rows, train.seq_len)
        counts = self._counts[train.seq_len]
        flops_per_token = {"mfu": counts.training_flops(recurrences)}
        if train.activation_checkpointing == "block":
            flops_per_token["hfu"] = counts.hardware_flops(recurrences)
        elif train.segment_tokens is not None:  # every product twice forward, and backward
            flops_per_token["hfu"] = 4 / 3 * counts.training_flops(recurrences)
        if self._peak is None:
            return dict.fromkeys(flops_per_token)
        peak = self._peak * world_size()
        return {name: flops * self._speed / peak for name, flops in flops_per_token.items()}
