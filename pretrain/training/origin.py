"""The search for what made a number that is not finite: one step again, looked at by hooks.

A module has made it where what it was given is finite and what it returns is not. In the backward
pass that is the module whose input's gradient is the first that is not finite. Modules within a
mixer are named where they can be; what a mixer computes without a module is named as the mixer's.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pretrain.data.batch import Batch
from pretrain.model.language_model import LanguageModel
from pretrain.model.recursion import Recursion
from pretrain.nn.linear import RowParallelLinear
from pretrain.nn.moe import MoE
from pretrain.ops.shared.watching import is_backward_pass
from pretrain.parallel.processes import (
    context_group,
    data_parallel_rank_and_size,
    gather,
    rank,
)
from pretrain.training.engine import Engine
from pretrain.training.run_control import kept_random_numbers, seed_step

# Whose results are watched, in the order in which a block runs them.
_OPERATIONS = (
    *("mixer_norm", "mixer", "mixer_post_norm", "mlp_norm", "mlp", "mlp_post_norm"),
    *("embedding", "final_norm"),
)


@dataclass(frozen=True)
class Event:
    """The first number of a process that is not finite.

    Attributes:
        backward: Whether it is a gradient.
        order: When it was made, comparable between processes that run the same stage.
        module: Dotted name of what made it, or of the parameter whose gradient it is.
        parameter: Whether it is the gradient of a parameter.
        value: ``NaN`` or ``infinity``.
        weight: The module's weight that is not finite itself, if one is.
        micro_batch: Its number among those of this process.
        token: The first token of the row, from 0, that has it; None where all have, or no token.
        rank: The process.
        data_rank: Its number among the data-parallel ones.
        host: Its machine.
    """

    backward: bool
    order: tuple[int, ...]
    module: str
    parameter: bool
    value: str
    weight: str | None
    micro_batch: int
    token: int | None
    rank: int
    data_rank: int
    host: str


@dataclass(frozen=True)
class Found:
    """What a step that was run again has shown, the same on every process."""

    loss: float
    event: Event | None
    sums: str | None
    """The parameter whose gradient is not finite although everything that was added up is."""

    @property
    def finite(self) -> bool:
        """Return whether nothing was found."""
        return self.event is None and self.sums is None and abs(self.loss) < float("inf")


class Search:
    """Hooks on this process's stages, while open, that find its first number that is not finite."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._handles: list[RemovableHandle] = []
        self._micro_batch, self._count = 0, 0
        self._rank, self._host = rank(), socket.gethostname()
        self.first: Event | None = None

    def __enter__(self) -> Search:
        for part in self._engine.parts:
            for name, module in part.named_modules():
                if module is not part:
                    self._watch(part, name, module)
            self._watch_whole(part)
            for name, parameter in part.named_parameters():
                if parameter.requires_grad:
                    look = partial(self._look_at_gradient, part, name, parameter=True)
                    self._handles.append(parameter.register_hook(look))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, part: LanguageModel, name: str, module: nn.Module) -> None:
        operation = name.rpartition(".")[2] in _OPERATIONS and name.count(".") in (0, 2)

        def after(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            x = given[0] if given else None
            y = output[0] if isinstance(output, tuple) else output
            if operation and isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(partial(self._look_at_gradient, part, name))
            if self.first is None and not is_backward_pass() and isinstance(y, Tensor):
                self._count += 1
                if _is_finite(x) and not _is_finite(y):
                    self._keep(part, name, module, y)

        self._handles.append(module.register_forward_hook(after))

    def _watch_whole(self, part: LanguageModel) -> None:
        """Count micro-batches, and look at the losses: the head is no module that is called."""

        def before(*_: Any) -> None:
            if part is self._engine.parts[0] and not is_backward_pass():
                self._micro_batch, self._count = self._micro_batch + 1, 0

        def after(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if part.stage.last and self.first is None and not is_backward_pass():
                self._count += 1
                if not _is_finite(output):
                    head = part.embedding if part.model_config.tie_embeddings else part.head
                    self._keep(part, "head", head, output.t()[..., None])

        def final(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:  # the head's input
                output.register_hook(partial(self._look_at_gradient, part, "head"))

        self._handles.append(part.register_forward_pre_hook(before))
        self._handles.append(part.register_forward_hook(after))
        if part.stage.last:
            self._handles.append(part.final_norm.register_forward_hook(final))

    def _look_at_gradient(
        self, part: LanguageModel, name: str, gradient: Tensor, *, parameter: bool = False
    ) -> None:
        if self.first is None:
            self._count += 1
            if not _is_finite(gradient):
                self._keep(part, name, None, gradient, backward=True, parameter=parameter)

    def _keep(
        self,
        part: LanguageModel,
        name: str,
        module: nn.Module | None,
        x: Tensor,
        *,
        backward: bool = False,
        parameter: bool = False,
    ) -> None:
        x, weight = x.detach(), None
        if module is not None:
            own = module.named_parameters(name)
            weight = next((n for n, p in own if not _is_finite(p)), None)
        data_rank, size = data_parallel_rank_and_size()
        # Whose weight is not finite is no victim; who adds up what others made may be one.
        suspicion = 0 if weight else 1 + isinstance(module, RowParallelLinear)
        token = None if parameter else _first_token(x, part)
        number = self._micro_batch * size + data_rank
        place = -part.stage.blocks.start if backward else part.stage.blocks.start
        self.first = Event(
            backward,
            (backward, number, place, self._count, suspicion, -1 if token is None else token),
            name,
            parameter,
            "NaN" if bool(x.isnan().any()) else "infinity",
            weight,
            self._micro_batch - 1,
            token,
            self._rank,
            data_rank,
            self._host,
        )


def search(
    engine: Engine,
    batches: Sequence[Batch],
    seed: int,
    step: int,
    place: tuple[int, int] | None = None,
) -> Found:
    """Run a step's passes again, and return what makes numbers that are not finite.

    Nothing of the training changes: no weight, no state, no random number, no metric of a layer.
    Rows that carry states begin without one. ``place``: the data-parallel rank, of how many, whose
    batches these are; this process's unless given. Every process must call.
    """
    rank_and_size = place or data_parallel_rank_and_size()
    kept = _Kept(engine)
    with kept_random_numbers():
        seed_step(seed, step)
        engine.begin_step(seed, step, *rank_and_size)
        with Search(engine) as found:
            loss, _ = engine.passes(batches)
        unsummed = None if found.first is not None else _not_finite_sum(engine)
        engine.backend.forget_gradients()
    kept.restore()
    everyone = gather((found.first, unsummed))
    events = [event for event, _ in everyone if event is not None]
    sums = next((name for _, name in everyone if name is not None), None)
    event = min(events, key=lambda one: (*one.order, one.rank), default=None)
    return Found(loss, event, sums)


class _Kept:
    """What layers remember of steps, as it was before a search."""

    def __init__(self, engine: Engine):
        self._engine = engine
        modules = [module for part in engine.parts for module in part.modules()]
        self._kept = [
            (module, {k: list(v) if isinstance(v, list) else v for k, v in vars(module).items()})
            for module in modules
            if isinstance(module, MoE | Recursion)
        ]

    def restore(self) -> None:
        """Bring it back; what mixers have measured meanwhile is forgotten."""
        for part in self._engine.parts:
            part.mixer_metrics()
        for module, values in self._kept:
            vars(module).update(values)
        self._engine.forget_carried()


def _not_finite_sum(engine: Engine) -> str | None:
    """Return the name of a parameter whose summed gradient is not finite, if there is one."""
    for part in engine.parts:
        for name, parameter in part.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            gradient = parameter.grad if gradient is None else gradient
            if gradient is not None and not _is_finite(gradient):
                return name
    return None


def _first_token(x: Tensor, part: LanguageModel) -> int | None:
    """Return the first token of the row with a number of x ``[T, 1, d]`` that is not finite.

    None where all of the row's tokens have one, so that no document is to blame, or x has another
    shape.
    """
    if x.ndim != 3 or x.shape[1] != 1:
        return None
    bad = ~x.isfinite().flatten(1).all(1)
    if bool(bad.all()):
        return None
    first = int(bad.nonzero()[0])
    context, group = part.context, context_group()
    if context.sequence_parallel and len(bad) * context.tensor_size:
        first += context.tensor_rank * len(bad)
    if group is not None:
        length = len(bad) * (context.tensor_size if context.sequence_parallel else 1)
        first += group.rank() * length
    return first


def _is_finite(x: Any) -> bool:
    """Return whether a tensor has finite numbers alone, true of anything else."""
    return not (isinstance(x, Tensor) and x.is_floating_point()) or bool(
        x.detach().isfinite().all()
    )
