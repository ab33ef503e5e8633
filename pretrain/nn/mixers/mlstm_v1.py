"""mLSTM as xLSTM had it first (arXiv 2405.04517): the memory inside a gated block, without an MLP.

    u, z = W x;  c = SiLU(conv(u));  q, k = blocks of c;  v = blocks of u
    i, f = W_g [q, k, v] + b;  y = W_o ((norm(memory(q, k, v, i, f)) + s * c) * SiLU(z))

q, k and v come from blocks of 4 channels each; the memory is that of :mod:`.mlstm`, without bounds
on its gates; norm is per head, and s is learned. Models of it have no MLP (``mlp: {kind: none}``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, row_linear
from pretrain.nn.mixers.base import (
    LayerContext,
    Mixer,
    MixerCard,
    MixerConfig,
    State,
    register,
)
from pretrain.nn.mixers.mlstm import forget_bias, normalized_memory
from pretrain.nn.mixers.parts import (
    add_short_convolutions,
    convolution_states,
    convolve,
    gate_parameter,
    linear_attention_flops,
    matrix_state,
)
from pretrain.nn.mixers.sizes import heads_for, integral
from pretrain.nn.parameters import constant, matrix_parameter, normal, sharded_parameter
from pretrain.ops.elementwise.fusing import fused
from pretrain.parallel.collectives import reduce_scatter_sequence


@dataclass(frozen=True)
class MLSTMv1Config(MixerConfig):
    """Settings of mLSTM's first block, whose inner width is ``num_heads * head_dim``."""

    expand: float = setting(2.0, above=0)
    """Inner width as a multiple of the model's."""
    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: four, or three, two or one where four do not divide the inner width."""
    head_dim: Derived = setting(None, minimum=1)
    """Width of a key and of a value; null: the inner width over ``num_heads``."""
    block_size: int = setting(4, minimum=1)
    """Channels that queries, keys and values are each computed from, a divisor of ``head_dim``."""
    conv_size: int = setting(4, minimum=0)
    """Taps of the short convolution before queries and keys; 0: there is none."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the variance in the norm of what is read."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, which changes speed alone."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        inner = integral(hidden_size * self.expand, "hidden_size * expand")
        num_heads, head_dim, block = self.num_heads, self.head_dim, self.block_size
        if num_heads is None and head_dim is not None:
            num_heads = heads_for(inner, head_dim)
        elif num_heads is None:
            num_heads = max((n for n in range(1, 5) if inner % (n * block) == 0), default=1)
        if head_dim is None:  # whole blocks
            head_dim = math.ceil(inner / num_heads / block) * block
        return replace(self, num_heads=num_heads, head_dim=head_dim)

    @property
    def inner(self) -> int:
        """Return the inner width."""
        return self.num_heads * self.head_dim


@register("mlstm_v1")
class MLSTMv1(Mixer):
    """mLSTM's first block, as a mixer.

    Its state is the convolution's last inputs, C and n, ``[N, H, D, D + 1]`` in float32, and m
    ``[N, H]`` in float64.
    """

    config_class = MLSTMv1Config
    exact_states = ("max",)
    mitigable = ("decay_scale", "write_scale", "window")
    card = MixerCard(
        "mLSTM's first block (xLSTM)",
        "C_t = f_t C_{t-1} + e^{i_t} k_t^T v_t;  o_t = q_t C_t / max(|q_t n_t|, 1)",
        "H D (D + 1)",
        "chunks",
        "arXiv 2405.04517",
    )

    def __init__(self, config: MLSTMv1Config, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        local, block = self.num_heads * config.head_dim, config.block_size
        self.u_proj = column_linear(parallel, d, config.inner, context.std)
        self.z_proj = column_linear(parallel, d, config.inner, context.std)
        self.o_proj = row_linear(parallel, config.inner, d, context.output_std)
        add_short_convolutions(self, parallel, {"u": local}, config.conv_size, bias=True)
        for name in "qkv":
            shape, init = (local // block, block, block), normal(context.std)
            self.register_parameter(f"{name}_blocks", sharded_parameter(parallel, shape, init))
        # Gates start as constants, the same for every token; i of a head, then its f. Inputs are a
        # head's q, k and v, then the next head's.
        gates = (2 * config.num_heads, 3 * local)
        self.gates = matrix_parameter(parallel, gates, 0.0, 1)
        self.i_bias = gate_parameter(parallel, (self.num_heads,), normal(0.1))
        self.f_bias = gate_parameter(parallel, (self.num_heads,), forget_bias)
        self.norm = sharded_parameter(parallel, (local,), constant(1.0))
        self.skip = sharded_parameter(parallel, (local,), constant(1.0))

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        new_state: State = {}
        u = self.u_proj(x)
        c = convolve(self, "u", u, sequences, state, new_state)
        inputs = {"q": c, "k": c, "v": u.transpose(0, 1)}
        q, k, v = (self._by_blocks(name, given) for name, given in inputs.items())
        i, f = self._gates(torch.stack([q, k, v], 3))
        read = normalized_memory(self, q, k, v, i, f, sequences, state, new_state)
        gate = self.z_proj(x).transpose(0, 1)
        y = _skipped(read, self.norm, c, self.skip, gate)
        return self.o_proj(y.transpose(0, 1)), new_state

    def _by_blocks(self, name: str, x: Tensor) -> Tensor:
        """Multiply every block of x ``[B, T, D]`` by its matrix; ``[B, T, H, dim]``."""
        blocks: Tensor = getattr(self, f"{name}_blocks")
        by_block = x.flatten(0, 1).unflatten(-1, (len(blocks), -1)).transpose(0, 1)
        y = torch.bmm(by_block, blocks).transpose(0, 1)
        return y.reshape(*x.shape[:2], self.num_heads, self.config.head_dim)

    def _gates(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Return i and f ``[B, T, H]`` in float64, of q, k and v of all heads ``[B, T, H, 3, D]``.

        Every rank has a part of each sum, and keeps the sums of its heads.
        """
        both = F.linear(qkv.flatten(2), self.gates).movedim(-1, 0)
        i, f = reduce_scatter_sequence(both, self.parallel.group).unflatten(0, (-1, 2)).unbind(1)
        return tuple(
            gate.movedim(0, -1).double() + bias.double()
            for gate, bias in ((i, self.i_bias), (f, self.f_bias))
        )

    @override
    def init_state(self, batch_size: int) -> State:
        dim, device = self.config.head_dim, self.parallel.device
        return {
            **convolution_states(self, self.parallel, batch_size, "u"),
            "recurrent": matrix_state(self.parallel, batch_size, self.num_heads, dim, dim + 1),
            "max": torch.zeros(batch_size, self.num_heads, dtype=torch.float64, device=device),
        }

    @classmethod
    @override
    def check(cls, config: MLSTMv1Config, hidden_size: int) -> None:
        if config.head_dim % config.block_size:
            raise ValueError(
                f"block_size is {config.block_size}, which does not divide head_dim "
                f"{config.head_dim}"
            )

    @classmethod
    @override
    def num_parameters(cls, config: MLSTMv1Config, hidden_size: int) -> int:
        inner, h = config.inner, config.num_heads
        convolution = config.conv_size + (config.conv_size > 0)
        channel = 3 * hidden_size + 3 * config.block_size + 6 * h + convolution + 2
        return inner * channel + 2 * h

    @classmethod
    @override
    def flops_per_token(cls, config: MLSTMv1Config, hidden_size: int, seq_len: int) -> int:
        h, dim = config.num_heads, config.head_dim
        channel = 3 * hidden_size + 3 * config.block_size + 6 * h
        mixing = linear_attention_flops(dim, dim + 1, config.chunk_size)
        return 2 * config.inner * channel + h * mixing

    @classmethod
    @override
    def state_bytes(cls, config: MLSTMv1Config, hidden_size: int, seq_len: int) -> int:
        dim = config.head_dim
        memory = config.num_heads * (4 * dim * (dim + 1) + 8)
        return memory + 2 * max(config.conv_size - 1, 0) * config.inner


@fused
def _skipped(read: Tensor, norm: Tensor, c: Tensor, skip: Tensor, gate: Tensor) -> Tensor:
    """Return ``(read * norm + skip * c) * SiLU(gate)``."""
    return (read * norm + skip * c) * F.silu(gate)
