"""The protocol of the backends that compute gradients and update weights, and their choice."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.sharded_state import State
from pretrain.config import OptimizerConfig, ParallelConfig
from pretrain.data.batch import Batch
from pretrain.model.language_model import LanguageModel
from pretrain.nn.parameters import info_of

# By the names of parallel.zero_backend.
BACKENDS = {
    "megatron": "pretrain.optim.backends.megatron.MegatronBackend",
    "deepspeed": "pretrain.optim.backends.deepspeed.DeepSpeedBackend",
}


class UpdateBackend(ABC):
    """The owner of this process's wrapped stages and their optimizer.

    A step is :meth:`forward_backward`, then :meth:`optimizer_step`; both are called by every
    process. ``modules`` are the stages as megatron-core's schedules run them, ``step_seed`` is
    (seed of the run, step), which random gradient noise depends on.
    """

    config: OptimizerConfig
    parts: list[LanguageModel]
    modules: list[Any]
    optimizer: Any
    step_seed: tuple[int, int] = (0, 0)
    # Called in a step when its gradients are complete, before clipping and the update.
    gradients_are_ready: Callable[[], None] | None = None
    holding = False  # whether parameters whose description says that they wait stay as they are
    _hooks: Sequence[Any] = ()

    @abstractmethod
    def __init__(
        self,
        parts: Sequence[LanguageModel],
        config: OptimizerConfig,
        parallel: ParallelConfig,
    ): ...

    @abstractmethod
    def forward_backward(self, batches: Sequence[Batch]) -> Tensor:
        """Compute gradients of the global batch's mean loss from this process's micro-batches.

        Returns the sums of :func:`.pipeline.weighted_losses` over these micro-batches on the last
        stage of a pipeline, zeros on the others.
        """

    @abstractmethod
    def optimizer_step(self, lr: float, loss: float) -> tuple[float, bool]:
        """Update the weights, unless the loss or a gradient is not finite.

        Returns (global gradient norm before clipping, whether the weights were updated).
        """

    def forget_gradients(self) -> None:
        """Leave out the update after :meth:`forward_backward`; every process must call."""
        return

    @abstractmethod
    def gather_weights(self) -> None:
        """Gather weights that the next forward pass would gather late; every process must call."""

    @abstractmethod
    def weights_state(self, *, saving: bool) -> State:
        """Return every weight by its name that this process has, or (``saving``) writes."""

    @abstractmethod
    def optimizer_state(self, *, saving: bool) -> State:
        """Return the optimizer's state, by :func:`optimizer_key`, as :meth:`weights_state` does.

        It is exp_avg, exp_avg_sq and, where weights are in low precision, the float32 weight of
        everything that this process updates; the tensors are the optimizer's own.
        """

    @abstractmethod
    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what updates change, by the parameter's name: each element on one process alone."""

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradients as :meth:`masters` does, while they are ready."""

    @abstractmethod
    def loaded(self, num_updates: int, num_held: int = 0) -> None:
        """Update what depends on loaded weights and state, of ``num_updates`` updates.

        In the first ``num_held`` of them parameters that wait were held.
        """

    def hold(self, holding: bool) -> None:
        """Leave parameters that wait, and their state, as they are from now on, or do not.

        Their gradients become zero, so that they count in no norm.
        """
        if holding == self.holding:
            return
        self.holding = holding
        for hook in self._hooks:
            hook.remove()
        parameters = [p for part in self.parts for p in part.parameters()] if holding else []
        self._hooks = [
            p.register_hook(torch.zeros_like)
            for p in parameters
            if p.requires_grad and info_of(p).waits
        ]

    def _tell_of_gradients(self) -> None:
        if self.gradients_are_ready is not None:
            self.gradients_are_ready()

    def set_hyperparameters(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        """Set this step's hyper-parameters on an optimizer's groups; nothing else applies them.

        Also after a checkpoint, whose groups carry the settings of its own run. ``lr_mult`` and
        ``wd_mult`` of a group are its parameters' multiples. The learning rate times the weight
        decay, what a step takes of a weight, does not follow ``lr_mult``: at every width weights
        forget as fast (arXiv 2203.03466, B.3). Settings that are named after the optimizer's rule,
        as ``muon_momentum`` is, are its own and reach it by their names.
        """
        kind = f"{self.config.kind}_"
        own = {name: value for name, value in vars(self.config).items() if name.startswith(kind)}
        for group in groups:
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"] / group["lr_mult"]
            if group.get("waits"):
                group["held"] = self.holding
                if self.holding:  # for an optimizer that does not know of it
                    group["lr"] = group["weight_decay"] = 0.0
            group["betas"], group["eps"] = tuple(self.config.betas), self.config.eps
            group["ema_decay"] = self.config.ema_decay
            group.update(own)


def make_backend(
    parts: Sequence[LanguageModel],
    config: OptimizerConfig,
    parallel: ParallelConfig,
) -> UpdateBackend:
    """Make the backend that ``parallel.zero_backend`` names; process groups must exist."""
    module, _, name = BACKENDS[parallel.zero_backend].rpartition(".")
    kind: type[UpdateBackend] = getattr(importlib.import_module(module), name)
    return kind(parts, config, parallel)
