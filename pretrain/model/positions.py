"""Positions of tokens in their documents, for what a model adds to the residual stream by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.nn.mixers import State
from pretrain.parallel.context import ParallelContext


def token_positions(
    tokens: Tensor,
    sequences: Sequences | None,
    states: Sequence[State] | None,
    context: ParallelContext,
) -> Tensor:
    """Return the position of each of tokens ``[B, T]``, from 0, ``[T, B]`` int64.

    Texts go on where ``states`` have come to: one of these must count what it has seen. With
    sequence parallelism the positions are of this rank's part of T.
    """
    rows, length = tokens.shape
    if sequences is None:
        positions = torch.arange(length, device=tokens.device)[:, None].expand(length, rows)
    else:
        positions = sequences.positions[:, None]
    if states is not None:
        seen = next(state["seen"] for state in states if "seen" in state)
        if sequences is not None:
            seen = torch.repeat_interleave(seen, sequences.sizes)[:, None]
        positions = positions + seen
    if context.sequence_parallel:
        positions = positions.chunk(context.tensor_size)[context.tensor_rank]
    return positions
