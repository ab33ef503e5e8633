"""Dropout whose masks are the same under every layout (JMLR 15, 2014, "Dropout").

A mask is drawn for a whole sequence at a time, from the run's seed, the step, the sequence's number
in the global batch and the place in the model; a process uses the part that it has tokens of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.parallel.context import ParallelContext

# Leaves out channels of x [T, 1, d] at a place: (block, pass of a loop, which of the block's).
DropAt = Callable[[Tensor, tuple[int, int, int]], Tensor]
EMBEDDING = (-1, 0, 0)
_DROPOUT = 2  # which of a step's streams of random numbers, see pretrain.model.recursion


class Dropout:
    """Counts a step's micro-batches, and draws for them.

    ``probability`` of every channel of every token to be left out; what stays grows by as much.
    ``seq_len``: tokens of a sequence of the global batch; None: a micro-batch is one.
    """

    def __init__(self, probability: float, seq_len: int | None, context: ParallelContext):
        self.probability, self.seq_len, self._context = probability, seq_len, context
        self._seeds, self._micro_batch = (0, 0), 0
        self._place, self._places = 0, 1

    def begin_step(self, seed: int, step: int, place: int, places: int) -> None:
        """This process, the ``place``-th of ``places`` data-parallel ones, takes the global batch's
        micro-batches by turns.
        """
        self._seeds, self._micro_batch = (seed, step), 0
        self._place, self._places = place, places

    def next_micro_batch(self) -> DropAt:
        """For the forward pass that begins now, and for its recomputation."""
        number = self._micro_batch * self._places + self._place
        self._micro_batch += 1
        return partial(self._apply, (*self._seeds, number))

    def _apply(self, seeds: tuple[int, int, int], x: Tensor, place: tuple[int, int, int]) -> Tensor:
        result: Tensor = _Masked.apply(x, self._mask(seeds, x, place), 1 / (1 - self.probability))
        return result

    def _mask(self, seeds: tuple[int, int, int], x: Tensor, place: tuple[int, int, int]) -> Tensor:
        """Bool, as x: True where it stays."""
        tokens, rows, d = x.shape
        if rows != 1:
            raise ValueError(f"dropout is for sequences packed in one row, x has {rows}")
        divided = self._context.sequence_parallel
        shares = self._context.tensor_size if divided else 1
        length = self.seq_len or tokens * shares
        seed, step, micro_batch = seeds
        start = micro_batch * tokens * shares  # of the global batch's tokens
        if divided:
            start += tokens * self._context.tensor_rank
        mask = torch.empty(tokens, rows, d, dtype=torch.bool, device=x.device)
        if x.is_meta:
            return mask
        stop = start + tokens
        for number in range(start // length, -(-stop // length)):
            low, high = max(number * length, start), min((number + 1) * length, stop)
            own = mask[low - start : high - start]
            whole = own if high - low == length else own.new_empty(length, rows, d)
            seeds_of_one = [seed, step, number, *(part + 1 for part in place), _DROPOUT]
            drawn = int(np.random.default_rng(seeds_of_one).integers(2**62))
            generator = torch.Generator(x.device).manual_seed(drawn)
            whole.bernoulli_(1 - self.probability, generator=generator)
            if whole is not own:
                own.copy_(whole[low - number * length : high - number * length])
        return mask


class _Masked(torch.autograd.Function):
    """x times mask times scale; of x nothing is kept."""

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
