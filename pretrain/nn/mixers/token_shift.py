"""RWKV's token shift: inputs that are mixed, channel by channel, with those of the token before.

    x_c = x + mu_c (x' - x)

x' is 0 at the first token of a document.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.nn.mixers.base import states_wanted
from pretrain.ops import short_convolution
from pretrain.ops.elementwise.fusing import fused
from pretrain.parallel.context import ParallelContext


def token_before(
    x: Tensor, sequences: Sequences | None, last: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the tokens before those of x ``[T, B, d]``, and the last of each sequence.

    ``last`` ``[N, 1, d]`` are those before the sequences that go on; None: they begin here. The
    second result is None where nobody reads states.
    """
    before, last = short_convolution(
        x.transpose(0, 1),
        F.pad(x.new_ones(x.shape[-1], 1), (0, 1)),  # taps that give the token before
        sequences=sequences,
        initial_state=last,
        final_state=states_wanted(),
    )
    return before.transpose(0, 1), last


def no_token_before(parallel: ParallelContext, batch_size: int, hidden_size: int) -> Tensor:
    """Return what :func:`token_before` takes as ``last`` before any token."""
    return torch.zeros(batch_size, 1, hidden_size, dtype=parallel.dtype, device=parallel.device)


@fused
def mixed(x: Tensor, before: Tensor, mix: Tensor) -> tuple[Tensor, ...]:
    """Return ``x + mu (before - x)`` for each row mu of ``mix``."""
    change = before - x
    return tuple(x + mu * change for mu in mix.to(x.dtype))
