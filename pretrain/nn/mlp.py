"""The position-wise half of a block: SwiGLU (arXiv 2002.05202), or a plain MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.nn.channel_mixing import ChannelMixing
from pretrain.nn.linear import column_input, column_linear, row_linear
from pretrain.nn.mixers.base import LayerContext
from pretrain.ops.elementwise.gating import swiglu
from pretrain.ops.shared.recomputation import recomputed


class MLP(nn.Module):
    """The MLP ``W_down(SiLU(W_gate x) * W_up x)``, or ``W_down f(W_up x)``.

    f is GELU or ReLU, as ``kind`` says.
    """

    def __init__(self, kind: str, intermediate_size: int, context: LayerContext):
        super().__init__()
        self.parallel, d = context.parallel, context.hidden_size
        if kind == "swiglu":
            self.gate_proj = column_linear(self.parallel, d, intermediate_size, context.std)
        self.kind = kind
        self.up_proj = column_linear(self.parallel, d, intermediate_size, context.std)
        self.down_proj = row_linear(self.parallel, intermediate_size, d, context.output_std)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, B, d]`` to the same shape."""
        x = column_input(x, self.parallel, self)
        up = self.up_proj(x)
        if self.kind == "swiglu":
            inner = swiglu(self.gate_proj(x), up)
        else:
            inner = recomputed(F.relu if self.kind == "relu" else F.gelu, up)
        y: Tensor = self.down_proj(inner)
        return y


def make_mlp(kind: str, intermediate_size: int, context: LayerContext) -> MLP | ChannelMixing:
    """Make the MLP of a kind that is not ``none``."""
    if kind == "rwkv":
        return ChannelMixing(intermediate_size, context)
    return MLP(kind, intermediate_size, context)


def mlp_matrices(kind: str, hidden_size: int, intermediate_size: int) -> int:
    """Return the parameters of an MLP's matrices, half of its matrix-multiply FLOPs per token."""
    count = {"swiglu": 3, "gelu": 2, "relu": 2, "rwkv": 2, "none": 0}[kind]
    return count * hidden_size * intermediate_size


def mlp_parameters(kind: str, hidden_size: int, intermediate_size: int) -> int:
    """Return the parameters of an MLP: RWKV's mixes its input by a vector, too."""
    vectors = hidden_size if kind == "rwkv" else 0
    return mlp_matrices(kind, hidden_size, intermediate_size) + vectors


def mlp_state_bytes(kind: str, hidden_size: int) -> int:
    """Return the bytes of what an MLP carries from token to token, in bfloat16."""
    return 2 * hidden_size if kind == "rwkv" else 0
