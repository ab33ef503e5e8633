"""What a stage of a model learns from the same stage of a teacher, which runs beside it.

Both streams go through the stages of a pipeline in one message. In the steps of alignment it is the
teacher's alone: each block with a new mixer gets the teacher's input of that block, and its loss is
each token's squared distance of the outputs as a multiple of the teacher's square, summed over
blocks; losses by token go on in the place of the student's stream. As a token's loss depends on no
other token's, it is the same in every micro-batch and layout.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.data.teacher_top import TeacherTop
from pretrain.model.block import Block, FirstValues, run_block
from pretrain.nn.linear import column_input
from pretrain.nn.parameters import change_info, info_of
from pretrain.ops.cross_entropy.distillation import (
    Teacher,
    TeacherRows,
    distillation_losses,
)
from pretrain.parallel.collectives import gather_sequence
from pretrain.parallel.megatron import viewless

if TYPE_CHECKING:
    from pretrain.model.language_model import LanguageModel


@dataclass(frozen=True)
class Recipe:
    """How a step learns from the teacher; see :class:`pretrain.config.distill.DistillConfig`."""

    align: bool = False
    weight: float = 1.0
    temperature: float = 1.0
    reverse: bool = False
    align_weight: float = 1.0


class Distillation:
    """A stage's part in learning from a teacher; ``recipe`` is that of the next micro-batches.

    ``teacher`` is the same stage of it, None where its likeliest ids come with the batches;
    ``vocabulary`` the number of ids that both have; ``new`` the blocks whose mixers alignment
    trains.
    """

    recipe = Recipe()

    def __init__(
        self,
        model: LanguageModel,
        teacher: LanguageModel | None,
        vocabulary: int,
        new: Collection[int] = (),
    ):
        self.model, self.teacher, self.vocabulary = model, teacher, vocabulary
        self.new = [index for index in model.stage.blocks if index in new]
        # Whether parameters that wait need a gradient of zero, by which they are known as done.
        self.touches = False
        self._found: dict[str, Tensor] = {}
        self._head: Tensor | None = None
        if teacher is not None and model.stage.last:
            self._head = _fitted_head(teacher, model.vocab_size)

    @property
    def width(self) -> int:
        """Return the width of the teacher's stream in what stages send each other."""
        return 0 if self.teacher is None else self.teacher.border_width

    def begin_step(self, recipe: Recipe) -> None:
        """Set how the micro-batches of a step are learned from."""
        self.recipe = recipe

    def receive(self, tensor: Tensor) -> Tensor:
        """Take the teacher's stream from what the previous stage has sent; return the rest."""
        if self.teacher is None:
            return tensor
        own, its = tensor.split([tensor.shape[-1] - self.width, self.width], -1)
        self.teacher._received = its.detach()
        return own.contiguous()

    def pack(self, own: Tensor, taught: Tensor | None = None) -> Tensor:
        """Return what is sent to the next stage; zeros where the teacher did not run."""
        if self.teacher is None:
            return own
        if taught is None:
            taught = own.new_zeros(*own.shape[:-1], self.width)
        return torch.cat([own, taught], -1)

    def losses(
        self,
        tokens: Tensor,
        targets: Tensor,
        sequences: Sequences | None,
        mask: Tensor | None,
        top: TeacherTop | None,
    ) -> Tensor:
        """Return training losses ``[B, T]``, or what the next stage is sent."""
        if self.recipe.align:
            return self._aligned(tokens, sequences, mask)
        model, handed = self.model, dict[str, FirstValues]()
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught, _, _ = self.teacher._hidden(
                    tokens, sequences, None, with_states=False, firsts=handed
                )
        firsts: dict[str, FirstValues] = {}
        x, _, ponder = model._hidden(tokens, sequences, None, with_states=False, firsts=firsts)
        if not model.stage.last:
            if self.teacher is not None:
                taught = self.teacher._on_the_way.pack(cast(Tensor, taught), handed)
            return viewless(self.pack(model._on_the_way.pack(x, firsts), taught))
        found = self._compared(x, self._teaching(taught, top), targets)
        kl, entropy = found[0], found[1]
        self._count("distill", mask, distill_kl=kl, cross_entropy=entropy)
        losses = self.recipe.weight * kl + (1 - self.recipe.weight) * entropy
        if ponder is not None:
            losses = cast(Any, model.recursion).with_cost(losses, ponder)
        return losses

    def _teaching(self, taught: Tensor | None, top: TeacherTop | None) -> Teacher:
        """Return what the teacher says of all tokens, in the order ``[T, B]``."""
        if self.teacher is None:
            assert top is not None
            return TeacherTop(*(x.transpose(0, 1).flatten(0, 1) for x in vars(top).values()))
        with torch.no_grad():
            rows = column_input(
                self.teacher._head_input(cast(Tensor, taught)), self.teacher.context
            )
        softcap = self.teacher.model_config.logit_softcap
        return TeacherRows(rows.flatten(0, 1), cast(Tensor, self._head), softcap)

    def _compared(self, x: Tensor, teacher: Teacher, targets: Tensor) -> Tensor:
        """Return divergences and cross entropies, ``[2, B, T]``."""
        model = self.model
        x = column_input(model._head_input(x), model.context)
        rows = model.vocab_size // model.context.tensor_size
        found = distillation_losses(
            x.flatten(0, 1),
            model._head_weight,
            targets.t().flatten(),
            teacher,
            tokens_at_once=max(model.logits_at_once // rows, 1),
            vocabulary=self.vocabulary,
            temperature=self.recipe.temperature,
            reverse=self.recipe.reverse,
            group=model.context.group,
            softcap=model.model_config.logit_softcap,
            z_loss_weight=model.model_config.z_loss_weight,
        )
        return found.view(2, *reversed(targets.shape)).transpose(1, 2)

    # Alignment

    def _aligned(self, tokens: Tensor, sequences: Sequences | None, mask: Tensor | None) -> Tensor:
        """Return losses ``[B, T]`` of the distance of blocks, or what the next stage is sent."""
        model, teacher = self.model, self.teacher
        assert teacher is not None
        for experts in model.experts():
            experts.eval()  # nothing of them is to be learned or counted
        firsts, handed = dict[str, FirstValues](), dict[str, FirstValues]()
        total = None
        if not model.stage.first:
            before = model.embed(tokens, firsts)
            total = before[..., :2].to(_wide(before)).sum(-1)
        with torch.no_grad():
            x = teacher.embed(tokens, handed)
        distances = []
        for index in model.stage.blocks:
            with torch.no_grad():
                y, _ = run_block(
                    cast(Block, teacher.blocks[index]), x, sequences, 0, None, firsts=handed
                )
            block = cast(Block, model.blocks[index])
            if index in self.new or block.hands_on:
                mine, _ = run_block(
                    block,
                    x,
                    sequences,
                    0,
                    None,
                    model.activation_checkpointing,
                    firsts=firsts,
                )
            if index in self.new:
                wide = _wide(y)
                square = y.to(wide).square().sum(-1).clamp_min(torch.finfo(wide).eps ** 2)
                distances.append((mine.to(wide) - y.to(wide)).square().sum(-1) / square)
            x = y
        if distances:
            found = torch.stack(distances).sum(0)
            total = found if total is None else total + found
        total = torch.zeros(x.shape[:2], device=x.device) if total is None else total
        waiting = [p for p in model.parameters() if p.requires_grad] if self.touches else []
        total = _Touched.apply(total, *waiting)
        if not model.stage.last:
            # In two parts, so that little is lost where activations are in low precision.
            high = total.detach().to(x.dtype)
            low = (total - high.to(total.dtype)).to(x.dtype)
            rest = x.new_zeros(*x.shape[:2], model.model_config.hidden_size - 2)
            own = torch.cat([high[..., None], low[..., None], rest], -1)
            taught = teacher._on_the_way.pack(x, handed)
            return viewless(self.pack(model._on_the_way.pack(own, firsts), taught))
        if model.context.sequence_parallel:
            total = gather_sequence(total, model.context.group, reduce_gradient=False)
        self._count("align", mask, align_loss=total.t())
        return self.recipe.align_weight * total.t()

    # Metrics

    def _count(self, kind: str, mask: Tensor | None, **losses: Tensor) -> None:
        first = next(iter(losses.values()))
        mask = torch.ones_like(first) if mask is None else mask
        counted = {**losses, f"{kind}_targets": torch.ones_like(first)}
        for name, values in counted.items():
            more = (values.detach() * mask).sum().double()
            self._found[name] = self._found[name] + more if name in self._found else more

    def metrics(self) -> dict[str, float]:
        """Return and reset sums over tokens since the last call; see :func:`mean_metrics`."""
        found, self._found = self._found, {}
        return {name: float(value) for name, value in found.items()}


def mean_metrics(metrics: dict[str, float]) -> None:
    """Make means over tokens of what :meth:`Distillation.metrics` has added up, in place."""
    for kind, names in (("distill", ("distill_kl", "cross_entropy")), ("align", ("align_loss",))):
        count = metrics.pop(f"{kind}_targets", None)
        for name in names if count is not None else ():
            metrics[name] /= max(cast(float, count), 1.0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.no_grad()
def _fitted_head(teacher: LanguageModel, rows: int) -> Tensor:
    """Return this process's part of the teacher's head, with as many rows in all as ``rows``.

    Only rows that pad the vocabulary are cut or added.
    """
    weight, context = teacher._head_weight.detach(), teacher.context
    if teacher.vocab_size == rows:
        return weight
    if context.group is not None:
        parts = [torch.empty_like(weight) for _ in range(context.tensor_size)]
        dist.all_gather(parts, weight.contiguous(), group=context.group)
        weight = torch.cat(parts)
    fitted = weight.new_zeros(rows, weight.shape[1])
    count = min(rows, len(weight))
    fitted[:count] = weight[:count]
    return fitted.chunk(context.tensor_size)[context.tensor_rank].clone()


class _Touched(torch.autograd.Function):
    """A tensor as it is; the parameters get gradients of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zeros = (p.new_zeros(()).expand_as(p) for p in ctx.saved_tensors)
        return gradients[0], *zeros


def mark_waiting(model: LanguageModel, new: Collection[int]) -> None:
    """Mark in their descriptions the parameters that alignment leaves as they are."""
    for name, parameter in model.named_parameters():
        block, _, rest = name.removeprefix("blocks.").partition(".")
        learns = name.startswith("blocks.") and int(block) in new and rest.startswith("mixer.")
        if not learns and not info_of(parameter).waits:
            change_info(cast(Any, parameter), waits=True)
