"""Dropout whose masks are the same under every layout (JMLR 15, 2014, "Dropout").

A mask is drawn for a full sequence at a time, from the run's seed, the step, the sequence's number
in the global batch and the site in the model; a process uses the tokens that it has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.nn.global_batch import sequences_of
from pretrain.parallel.context import ParallelContext

# Drops channels of x [T, B, d] at a site: (block, pass of a loop, which of the block's).
DropAt = Callable[[Tensor, tuple[int, int, int]], Tensor]
EMBEDDING = (-1, 0, 0)
_DROPOUT = 2  # which of a step's streams of random numbers, see pretrain.model.recursion


class Dropout:
    """The masks of a step's micro-batches.

    Every channel of every token is dropped with ``probability``, and the others are scaled up.
    ``seq_len`` is the tokens of a sequence of the global batch; None: a row of x is one.
    """

    def __init__(self, probability: float, seq_len: int | None, context: ParallelContext):
        self.probability, self.seq_len, self._context = probability, seq_len, context
        self._seeds, self._micro_batch = (0, 0), 0
        self._rank, self._world_size = 0, 1

    def begin_step(self, seed: int, step: int, rank: int, world_size: int) -> None:
        """Set what masks are drawn from, on data-parallel rank ``rank`` of ``world_size``.

        The ranks take the global batch's micro-batches by turns.
        """
        self._seeds, self._micro_batch = (seed, step), 0
        self._rank, self._world_size = rank, world_size

    def next_micro_batch(self) -> DropAt:
        """Return the dropout of the forward pass that begins, also for its recomputation."""
        return partial(self._apply, self._next_seeds())

    def next_row(self, tokens: int) -> Callable[[int], DropAt]:
        """Return the dropout of a row of ``tokens`` that comes in segments, by their first token.

        Its masks are those of :meth:`next_micro_batch` for the row as a whole.
        """
        seeds = self._next_seeds()
        return lambda first: partial(self._apply, seeds, place=(first, tokens))

    def _next_seeds(self) -> tuple[int, int, int]:
        number = self._micro_batch * self._world_size + self._rank
        self._micro_batch += 1
        return *self._seeds, number

    def _apply(
        self,
        seeds: tuple[int, int, int],
        x: Tensor,
        site: tuple[int, int, int],
        place: tuple[int, int] | None = None,
    ) -> Tensor:
        mask = self._mask(seeds, x, site, place)
        result: Tensor = _Masked.apply(x, mask, 1 / (1 - self.probability))
        return result

    def _mask(
        self,
        seeds: tuple[int, int, int],
        x: Tensor,
        site: tuple[int, int, int],
        place: tuple[int, int] | None,
    ) -> Tensor:
        """Draw the mask of x: bool, in x's shape, True where a channel is kept.

        Rows count as the tokens of one row laid one after another.
        """
        tokens, rows, d = x.shape
        mask = torch.empty(rows, tokens, d, dtype=torch.bool, device=x.device)
        if not x.is_meta:
            seed, step, micro_batch = seeds
            for piece in sequences_of(x, micro_batch, self.seq_len, self._context, place):
                local = mask[piece.row, piece.places]
                whole = len(local) == piece.length
                full = local if whole else local.new_empty(piece.length, d)
                seeds_of_one = [seed, step, piece.number, *(part + 1 for part in site), _DROPOUT]
                drawn = int(np.random.default_rng(seeds_of_one).integers(2**62))
                generator = torch.Generator(mask.device).manual_seed(drawn)
                full.bernoulli_(1 - self.probability, generator=generator)
                if not whole:
                    local.copy_(full[piece.tokens])
        return mask.transpose(0, 1)


class _Masked(torch.autograd.Function):
    """x times mask times scale; backward keeps the mask, nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        # One kernel, named for what torch's own dropout does with it.
        result: Tensor = torch.ops.aten.native_dropout_backward(x, mask, scale)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(grad, mask, ctx.scale), None, None
