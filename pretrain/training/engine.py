"""One optimizer step, the same code on one process or many, over gloo or NCCL.

The model's stages run on megatron-core's schedules; gradients are reduced and parameters updated by
a backend, see :mod:`pretrain.optim.backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.checkpoint.sharded_state import Boxes, State
from pretrain.common.metrics import merge_metrics
from pretrain.config import OptimizerConfig, ParallelConfig
from pretrain.data.batch import Batch
from pretrain.model.carried import CarriedStates
from pretrain.model.distillation import Recipe
from pretrain.model.language_model import LanguageModel
from pretrain.optim.backends.base import make_backend
from pretrain.parallel.pipeline import local_part, run_schedule, score_schedule
from pretrain.parallel.processes import local_device, sum_over_replicas


@dataclass
class StepResult:
    """The outcome of one optimizer step.

    Attributes:
        loss: Mean over the global batch's counted targets, in nats, before the update.
        grad_norm: Global norm before clipping; None where ``skip_if`` had the step skipped.
        applied: Whether the parameters were updated.
        masked_loss: Mean over the hidden tokens of prefixes, in nats; None where there are none.
    """

    loss: float
    grad_norm: float | None
    applied: bool
    masked_loss: float | None = None


class Engine:
    """This process's stages of the model, wrapped, and their optimizer."""

    local_sum: Tensor
    """The summed loss of this process's micro-batches in the last step, on a pipeline's last
    stage."""

    def __init__(
        self,
        model: LanguageModel | Sequence[LanguageModel],
        config: OptimizerConfig,
        parallel: ParallelConfig | None = None,
    ):
        """Wrap the stages."""
        self.parts = [model] if isinstance(model, LanguageModel) else list(model)
        parallel = parallel or ParallelConfig()
        if parallel.expert > 1 or parallel.context > 1:  # every pass of a loop exchanges something
            for part in self.parts:
                if part.recursion is not None:
                    part.recursion.in_step = True
        self.backend = make_backend(self.parts, config, parallel)
        self.recipe: Callable[[int], Recipe] | None = None  # of a step, where there is a teacher

    def begin_step(self, seed: int, step: int, rank: int = 0, world_size: int = 1) -> None:
        """See :meth:`pretrain.model.language_model.LanguageModel.begin_step`."""
        self.backend.step_seed = (seed, step)
        if self.recipe is not None:
            recipe = self.recipe(step)
            self.backend.hold(recipe.align)
            for part in self.parts:
                if part.distilled is not None:
                    part.distilled.begin_step(recipe)
        for part in self.parts:
            part.begin_step(seed, step, rank, world_size)

    def train_step(
        self,
        batches: Sequence[Batch],
        lr: float,
        skip_if: Callable[[float], bool] | None = None,
    ) -> StepResult:
        """Run forward, backward and update over this process's micro-batches of the global batch.

        A loss or gradient norm that is not finite leaves parameters and optimizer untouched, and so
        does a loss for which ``skip_if`` (not with DeepSpeed) says so, on every process. After such
        a step rows that carry states begin again without one.
        """
        loss, masked = self.passes(batches)
        if skip_if is not None and skip_if(loss):
            self.forget_carried()
            return StepResult(loss=loss, grad_norm=None, applied=False, masked_loss=masked)
        norm, applied = self.backend.optimizer_step(lr, loss)
        if not applied:
            self.forget_carried()
        elif not self.backend.holding:
            for part in self.parts:
                part.update_biases()
        return StepResult(loss=loss, grad_norm=norm, applied=applied, masked_loss=masked)

    def passes(self, batches: Sequence[Batch]) -> tuple[float, float | None]:
        """Run the forward and backward passes of :meth:`train_step` alone.

        Returns its loss, and that of masked tokens where some are.
        """
        for states in self._carried():
            states.expect(batches)
        sums = self.backend.forward_backward(batches)
        for states in self._carried():
            states.finish()
        self.local_sum = sums[0].clone()
        sum_over_replicas(sums)
        masked = float(sums[2] / sums[3].clamp_min(1)) if len(sums) > 2 else None
        return float(sums[0] / sums[1].clamp_min(1)), masked

    def carried_state(self) -> State:
        """Return what this process's rows carry from step to step, if anything; its own tensors."""
        return {
            name: Boxes(*boxes) for each in self._carried() for name, boxes in each.parts().items()
        }

    def forget_carried(self) -> None:
        """Have rows that carry states begin again without one."""
        for states in self._carried():
            states.forget()

    def _carried(self) -> list[CarriedStates]:
        return [part.carried for part in self.parts if part.carried is not None]

    @torch.no_grad()
    def validate(
        self, batches: Sequence[Batch], bytes_per_token: Tensor | None = None
    ) -> tuple[float, int, int]:
        """Return (mean loss in nats, counted targets, bytes of their text) of all processes.

        ``bytes_per_token`` is ``[vocab]``; without it the bytes are 0.
        """
        for part in self.parts:
            part.eval()
        total, count = run_schedule(self.backend.modules, batches, forward_only=True).tolist()
        text_bytes = 0.0
        if bytes_per_token is not None and self.parts[-1].stage.last:
            for batch in map(local_part, batches):
                text_bytes += float((bytes_per_token[batch.targets] * batch.loss_mask).sum())
        sums = torch.tensor([total, count, text_bytes], dtype=torch.float64, device=local_device())
        sum_over_replicas(sums)
        for part in self.parts:
            part.train()
        return float(sums[0] / sums[1].clamp_min(1)), int(sums[1]), int(sums[2])

    @torch.no_grad()
    def score(self, batches: Sequence[Batch], candidates: int) -> list[Tensor]:
        """Score in evaluation mode; see :func:`pretrain.parallel.pipeline.score_schedule`."""
        for part in self.parts:
            part.eval()
        try:
            return score_schedule(self.backend.modules, batches, candidates)
        finally:
            for part in self.parts:
                part.train()

    def layer_metrics(self) -> dict[str, float]:
        """Return and reset the metrics that local layers accumulated since the last call."""
        found: dict[str, float] = {}
        for part in self.parts:
            merge_metrics(found, part.metrics())
        return found

    def recursion_metrics(self) -> dict[str, float]:
        """Return the metrics of a recursive model's loop, where it is on this process."""
        loops = (part.recursion for part in self.parts)
        return next((loop.metrics() for loop in loops if loop is not None), {})
