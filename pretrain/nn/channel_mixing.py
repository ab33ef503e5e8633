"""RWKV-7's channel mixing (arXiv 2503.14456), an MLP that also sees the token before.

    y = W_down relu(W_up (x + mu (x' - x)))^2

x' is the input at the token before, 0 at a document's first. It starts as published (BlinkDL/
RWKV-LM, RWKV-v7): W_up orthogonal, W_down 0, and mu_n = 1 - (n / d)^((1 - l / L)^4) of channel n in
block l of L.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, head_shared, row_linear
from pretrain.nn.mixers.base import LayerContext
from pretrain.nn.mixers.rwkv7_start import Mix, start_orthogonal
from pretrain.nn.mixers.token_shift import mixed, no_token_before, token_before
from pretrain.nn.parameters import replicated_parameter
from pretrain.ops.elementwise.fusing import fused


class ChannelMixing(nn.Module):
    """RWKV-7's channel mixing; what it carries on is the last input ``[N, 1, d]``."""

    def __init__(self, intermediate_size: int, context: LayerContext):
        super().__init__()
        self.parallel = parallel = context.parallel
        self.hidden_size = d = context.hidden_size
        start = Mix((1 - context.index / context.count) ** 4)
        self.mix = replicated_parameter(parallel, (d,), start)
        up = column_linear(parallel, d, intermediate_size, 1.0)
        self.up_proj = start_orthogonal(up, parallel, 1.0)
        self.down_proj = row_linear(parallel, intermediate_size, d, 0.0)

    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, last: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map ``[T, B, d]`` to the same shape, and return the last inputs if they are wanted.

        ``last``: those before the sequences, which without them begin here. The sequences may be a
        segment of a row, whose last input then goes to the next one.
        """
        x = column_input(x, self.parallel)
        before, last = token_before(x, sequences, last)
        (x,) = mixed(x, before, head_shared(self.mix, self.parallel)[None])
        y: Tensor = self.down_proj(_squared_relu(self.up_proj(x)))
        return y, last

    def init_state(self, batch_size: int) -> Tensor:
        """Return the last inputs before any token."""
        return no_token_before(self.parallel, batch_size, self.hidden_size)


@fused
def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()
