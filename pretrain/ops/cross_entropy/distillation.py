"""Divergence from a teacher's distribution beside cross entropy, some tokens at a time.

The logits of both models are computed piece by piece of the tokens, and once more in the backward
pass: all tokens' are never stored, whether the vocabulary is sharded or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.data.teacher_top import TeacherTop
from pretrain.ops.cross_entropy.linear_cross_entropy import capped, local_targets


@dataclass(frozen=True)
class TeacherRows:
    """A teacher's hidden rows ``[N, d]`` and head, whose rows are divided as the student's.

    Its logits are ``f(x weight^T)``, f(l) = ``softcap tanh(l / softcap)`` where that is given.
    """

    x: Tensor
    weight: Tensor
    softcap: float | None = None


Teacher = TeacherRows | TeacherTop


@dataclass(frozen=True)
class _Options:
    tokens_at_once: int
    vocabulary: int
    temperature: float
    reverse: bool
    group: dist.ProcessGroup | None
    softcap: float | None
    z_loss_weight: float


def distillation_losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: Teacher,
    *,
    tokens_at_once: int,
    vocabulary: int,
    temperature: float = 1.0,
    reverse: bool = False,
    group: dist.ProcessGroup | None = None,
    softcap: float | None = None,
    z_loss_weight: float = 0.0,
) -> Tensor:
    """Return ``[2, N]``: divergences from the teacher, and cross entropies of ``targets``, in nats.

    The divergence is KL(teacher || student), or with ``reverse`` KL(student || teacher), of both
    logits divided by ``temperature``, times its square; only the first ``vocabulary`` ids take part
    in it. Of a teacher's likeliest ids it is that of k + 1 events, the last of which is any other
    id. The cross entropy is that of :func:`.linear_cross_entropy`, of which x, weight, targets,
    group, softcap and z_loss_weight are the arguments too; the gradient of the z-loss is weighted
    by the sum of both outputs' gradients. Raises ValueError for shapes that do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}, expected [N, d] and [V, d]"
        )
    if targets.shape != x.shape[:1]:
        raise ValueError(f"targets are {tuple(targets.shape)}, expected {tuple(x.shape[:1])}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0")
    if isinstance(teacher, TeacherRows):
        wanted = (len(x), len(weight))
        if (len(teacher.x), len(teacher.weight)) != wanted:
            raise ValueError(
                f"the teacher has {len(teacher.x)} hidden rows and {len(teacher.weight)} of its "
                f"head, expected {wanted[0]} and {wanted[1]}, as the student"
            )
    elif len(teacher.ids) != len(x):
        raise ValueError(f"the teacher has {len(teacher.ids)} tokens, expected {len(x)}")
    shards = group if group is not None and group.size() > 1 else None
    options = _Options(
        tokens_at_once, vocabulary, temperature, reverse, shards, softcap, z_loss_weight
    )
    losses: Tensor = _Distillation.apply(x, weight, targets, teacher, options)
    return losses


def _largest(values: Tensor) -> Tensor:
    """Return the largest of each row, minus infinity where there are no columns."""
    return values.amax(-1) if values.shape[1] else values.new_full(values.shape[:1], -torch.inf)


class _Piece:
    """Some tokens' logits at the temperature: the student's, and the teacher's probabilities.

    ``all`` are the student's logits as they are, ``s`` those of the ids that take part.
    """

    def __init__(self, x: Tensor, weight: Tensor, teacher: Teacher, part: slice, options: _Options):
        self.options, group = options, options.group
        self.first = 0 if group is None else group.rank() * len(weight)
        columns = min(max(options.vocabulary - self.first, 0), len(weight))
        wide = torch.promote_types(x.dtype, torch.float32)
        self.all = capped((x[part] @ weight.t()).to(wide), options.softcap)
        self.s = self.all[:, :columns] / options.temperature
        if isinstance(teacher, TeacherRows):
            logits = capped((teacher.x[part] @ teacher.weight.t()).to(wide), teacher.softcap)
            self.t = logits[:, :columns] / options.temperature
            return
        ids = teacher.ids[part].long() - self.first
        self.here = (ids >= 0) & (ids < columns)
        self.ids = torch.where(self.here, ids, 0)
        # What was rounded is made whole again.
        found = torch.cat([teacher.log_probs[part], teacher.log_rest[part, None]], 1).to(wide)
        found = found - found.logsumexp(-1, keepdim=True)
        self.log_p, self.log_p_rest = found[:, :-1], found[:, -1]

    def top(self, values: Tensor, fill: float) -> Tensor:
        """Return values ``[n, columns]`` at the teacher's ids ``[n, k]``, ``fill`` elsewhere."""
        if not values.shape[1]:
            return values.new_full(self.ids.shape, fill)
        return values.gather(1, self.ids).masked_fill(~self.here, fill)

    def others(self, values: Tensor) -> Tensor:
        """Return values ``[n, columns]`` with 0 at the teacher's ids."""
        if not values.shape[1]:
            return values
        taken = torch.zeros_like(values)
        taken.scatter_add_(1, self.ids, self.here.to(values.dtype))
        return values.masked_fill(taken > 0, 0)


def _times_log(p: Tensor, log: Tensor) -> Tensor:
    """Return ``p log``, 0 where p is: of no event, whatever the other distribution says."""
    return torch.where(p > 0, p * log, 0)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, teacher: Teacher, options: _Options
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        losses = torch.empty(2, len(x), dtype=wide, device=x.device)
        kept = torch.empty(4, len(x), dtype=wide, device=x.device)
        for start in range(0, len(x), options.tokens_at_once):
            part = slice(start, start + options.tokens_at_once)
            piece = _Piece(x, weight, teacher, part, options)
            measure = _of_rows if isinstance(teacher, TeacherRows) else _of_top
            losses[0, part], losses[1, part], kept[:, part] = measure(piece, targets[part])
        losses[0] *= options.temperature**2
        ctx.save_for_backward(x, weight, targets, kept)
        ctx.teacher, ctx.options = teacher, options
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets, kept = ctx.saved_tensors
        options: _Options = ctx.options
        d_x = torch.empty_like(x)
        d_weight = torch.zeros(weight.shape, dtype=kept.dtype, device=weight.device)
        for start in range(0, len(x), options.tokens_at_once):
            part = slice(start, start + options.tokens_at_once)
            piece = _Piece(x, weight, ctx.teacher, part, options)
            log_sum, own, other, value = kept[:, part, None].unbind(0)
            if isinstance(ctx.teacher, TeacherRows):
                d_s = _slope_of_rows(piece, own, other, value)
            else:
                d_s = _slope_of_top(piece, own, other, value)
            kl, ce = gradient[:, part, None].unbind(0)
            z = 2 * options.z_loss_weight * log_sum * (kl + ce) if options.z_loss_weight else 0
            d_logits = (piece.all - log_sum).exp_().mul_(ce + z)
            column, local = local_targets(targets[part], piece.first, len(weight))
            d_logits.scatter_add_(1, column[:, None], -ce * local[:, None])
            d_logits[:, : d_s.shape[1]] += d_s.mul_(kl * options.temperature)
            if options.softcap is not None:
                d_logits *= 1 - (piece.all / options.softcap).square_()
            low_precision = d_logits.to(x.dtype)
            d_x[part] = low_precision @ weight
            d_weight += low_precision.t() @ x[part]
        return d_x, d_weight.to(weight.dtype), None, None, None


def _everyones(
    piece: _Piece, targets: Tensor, maxima: list[Tensor], sums: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what all processes' columns have: largest values, and sums by those."""
    group = piece.options.group
    largest = torch.stack([piece.all.amax(-1), *maxima])
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    column, local = local_targets(targets, piece.first, piece.all.shape[1])
    shifted = piece.all - largest[0, :, None]
    wanted = shifted.gather(1, column[:, None])[:, 0] * local
    own = sums(*largest[1:, :, None])
    found = torch.stack([shifted.exp_().sum(-1), wanted, *own])
    if group is not None:
        dist.all_reduce(found, group=group)
    return list(largest), list(found)


def _of_rows(piece: _Piece, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return divergence and cross entropy of some tokens, and what the backward pass needs."""
    reverse = piece.options.reverse

    def sums(largest_s: Tensor, largest_t: Tensor) -> list[Tensor]:
        s, t = piece.s - largest_s, piece.t - largest_t
        e_s, e_t = s.exp(), t.exp()
        dot = e_s * (s - t) if reverse else e_t * (t - s)
        return [e_s.sum(-1), e_t.sum(-1), dot.sum(-1)]

    maxima = [_largest(piece.s), _largest(piece.t)]
    largest, (total, wanted, total_s, total_t, dot) = _everyones(piece, targets, maxima, sums)
    apart = total_s.log() - total_t.log()
    value = dot / total_s - apart if reverse else dot / total_t + apart
    kept = [
        total.log() + largest[0],
        total_s.log() + largest[1],
        total_t.log() + largest[2],
        value,
    ]
    return value, total.log() - wanted, torch.stack(kept)


def _slope_of_rows(piece: _Piece, own: Tensor, other: Tensor, value: Tensor) -> Tensor:
    """Return the divergence's derivative by the student's logits at the temperature."""
    log_q, log_p = piece.s - own, piece.t - other
    if piece.options.reverse:
        return log_q.exp() * (log_q - log_p - value)
    return log_q.exp() - log_p.exp()


def _of_top(piece: _Piece, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return divergence and cross entropy of some tokens, and what the backward pass needs."""
    p = piece.log_p.exp()

    def sums(largest_s: Tensor) -> list[Tensor]:
        s = piece.s - largest_s
        e = s.exp()
        chosen, e_top = piece.top(s, 0.0), piece.top(e, 0.0)
        if piece.options.reverse:
            dot = _times_log(e_top, chosen - piece.log_p)
        else:
            dot = _times_log(p * piece.here, piece.log_p - chosen)
        return [e.sum(-1), piece.others(e).sum(-1), dot.sum(-1)]

    maxima = [_largest(piece.s)]
    largest, (total, wanted, total_s, rest, dot) = _everyones(piece, targets, maxima, sums)
    log_s, p_rest = total_s.log(), piece.log_p_rest.exp()
    log_q_rest = rest.log() - log_s
    if piece.options.reverse:
        value = (dot - (total_s - rest) * log_s) / total_s
        value = value + _times_log(rest / total_s, log_q_rest - piece.log_p_rest)
    else:
        value = dot + p.sum(-1) * log_s + _times_log(p_rest, piece.log_p_rest - log_q_rest)
    kept = [total.log() + largest[0], log_s + largest[1], rest.log() + largest[1], value]
    return value, total.log() - wanted, torch.stack(kept)


def _slope_of_top(piece: _Piece, own: Tensor, rest: Tensor, value: Tensor) -> Tensor:
    """Return the divergence's derivative by the student's logits at the temperature."""
    log_q = piece.s - own
    q = log_q.exp()
    if not q.shape[1]:
        return q
    # Of the rest, whose share of q is the same factor for each of its ids.
    p_rest, log_q_rest = piece.log_p_rest[:, None].exp(), rest - own
    if piece.options.reverse:
        apart = torch.where(log_q_rest > -torch.inf, log_q_rest - piece.log_p_rest[:, None], 0)
        d = piece.others(q) * (apart - value)
        of_top = piece.top(q, 0.0) * (piece.top(log_q, 0.0) - piece.log_p - value)
    else:
        factor = torch.where(p_rest > 0, 1 - p_rest * (-log_q_rest).exp(), 1)
        d = piece.others(q) * factor
        of_top = piece.top(q, 0.0) - piece.log_p.exp()
    return d.scatter_add_(1, piece.ids, of_top.masked_fill(~piece.here, 0))
