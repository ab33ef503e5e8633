"""pLSTM for sequences (arXiv 2506.11997): a state of J parts turned by J x J matrices.

See :mod:`pretrain.ops.plstm`. T = exp(A_1) Diag(tanh 5 l) exp(A_2) with skew-symmetric A_1, A_2 and
l made of the input, of norm at most 1; S, M and D are sigmoids of learned numbers alone; the output
is W_o (RMSNorm(o) per head + W_p x). Other than in the public code, queries and keys are convolved
after their projections, as in the other layers here, in place of the layer's input before; and S, M
and D are drawn around its -5, as values that are all the same leave the J parts interchangeable for
ever.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, head_shared, row_linear
from pretrain.nn.mixers.base import (
    LayerContext,
    Mixer,
    MixerCard,
    MixerConfig,
    State,
    heads,
    register,
)
from pretrain.nn.mixers.parts import (
    add_short_convolutions,
    convolution_states,
    convolve,
    gate_parameter,
    linear_attention_flops,
    matrix_state,
)
from pretrain.nn.mixers.sizes import heads_for, per_head, split_width
from pretrain.nn.parameters import constant, replicated_parameter
from pretrain.ops import plstm
from pretrain.ops.elementwise.rms_norm import rms_norm


@dataclass(frozen=True)
class PLSTMConfig(MixerConfig):
    """Settings of pLSTM."""

    head_sizes = ("head_dim", "transition_size")

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: ``hidden_size / head_dim``, where a head has 128 channels, a quarter of a
    smaller width, or what divides the width near that."""
    head_dim: Derived = setting(None, minimum=1)
    """Channels of a key and of a value; null: ``hidden_size / num_heads``."""
    transition_size: Derived = setting(None, minimum=1)
    """The J of transitions, a divisor of ``head_dim``: parts of a value that they turn among each
    other; null: 4, or the larger of 2 and 1 that divides it. 1: decays of any sign."""
    conv_size: int = setting(4, minimum=0)
    """Taps of the short convolution over queries and keys; 0: there is none."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""
    chunk_size: int = setting(16, minimum=1)
    """Tokens handled at once by the chunked form, which changes speed alone."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = self.num_heads, self.head_dim
        if num_heads is None and head_dim is None:
            num_heads, head_dim = split_width(hidden_size, 128)
        num_heads = num_heads or heads_for(hidden_size, head_dim)
        head_dim = head_dim or per_head(hidden_size, num_heads)
        size = self.transition_size or next(j for j in (4, 2, 1) if head_dim % j == 0)
        return replace(self, num_heads=num_heads, head_dim=head_dim, transition_size=size)


@register("plstm")
class PLSTM(Mixer):
    """pLSTM for sequences, as a mixer.

    Its state is the convolutions' last inputs, and C ``[N, H, K, V]`` in float32.
    """

    config_class = PLSTMConfig
    card = MixerCard(
        "pLSTM (sequences)",
        "o_t = q_t C_{t-1} M^T + (q_t k_t) v_t D^T;  C_t = C_{t-1} T_t^T + k_t^T v_t S^T",
        "H K V",
        "chunks, small products within",
        "arXiv 2506.11997",
    )

    def __init__(self, config: PLSTMConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        width, local = config.num_heads * config.head_dim, self.num_heads * config.head_dim
        self.q_proj = column_linear(parallel, d, width, context.std)
        self.k_proj = column_linear(parallel, d, width, context.std)
        self.v_proj = column_linear(parallel, d, width, context.std)
        self.p_proj = column_linear(parallel, d, width, context.std)
        # Transitions start as constants, the same for every token.
        size, turns = config.transition_size, _turns(config)
        self.t_proj = column_linear(parallel, d, config.num_heads * turns, 0.0, precise=True)
        self.l_bias = gate_parameter(parallel, (self.num_heads, size), constant(1.0))
        if size > 1:
            shape = (self.num_heads, 2 * size**2)
            self.a_bias = gate_parameter(parallel, shape, constant(0.0))
        for name in "smd":
            gate = gate_parameter(parallel, (self.num_heads, size, size), _around_minus_five)
            self.register_parameter(f"{name}_gate", gate)
        self.o_proj = row_linear(parallel, width, d, context.output_std)
        add_short_convolutions(self, parallel, dict.fromkeys("qk", local), config.conv_size)
        self.norm = replicated_parameter(parallel, (config.head_dim,), constant(1.0))

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        new_state: State = {}
        q, k = (
            convolve(self, name, projection(x), sequences, state, new_state).unflatten(
                -1, (self.num_heads, -1)
            )
            for name, projection in (("q", self.q_proj), ("k", self.k_proj))
        )
        v = heads(self.v_proj(x), self.num_heads)
        transition = self._transition(heads(self.t_proj(x), self.num_heads))
        source, mark, direct = (
            self.get_parameter(f"{name}_gate").sigmoid().expand(transition.shape) for name in "smd"
        )
        self.note(source=source, mark=mark, direct=direct)
        y, new_state["recurrent"] = plstm(
            q,
            k,
            v,
            source,
            transition,
            mark,
            direct,
            sequences=sequences,
            chunk_size=self.config.chunk_size,
            initial_state=None if state is None else state["recurrent"],
        )
        y = rms_norm(y, head_shared(self.norm, self.parallel), self.config.norm_eps)
        y = y.flatten(2).transpose(0, 1) + self.p_proj(x)
        return self.o_proj(y), new_state

    def _transition(self, x: Tensor) -> Tensor:
        """Return T ``[B, T, H, J, J]`` of what its projection gives, ``[B, T, H, J + 2 J^2]``."""
        size, x = self.config.transition_size, x.to(self.l_bias.dtype)
        angle = 5 * (x[..., :size] + self.l_bias)
        stretch = torch.tanh(angle)
        if self.watch is not None:
            self.note(log_decay=_log_tanh(angle.detach().abs()))
        if size == 1:
            return stretch[..., None]
        matrices = (x[..., size:] + self.a_bias).unflatten(-1, (2, size, size))
        first, second = torch.linalg.matrix_exp((matrices - matrices.mT).contiguous()).unbind(-3)
        return (first * stretch[..., None, :]) @ second

    @override
    def init_state(self, batch_size: int) -> State:
        dim = self.config.head_dim
        return {
            **convolution_states(self, self.parallel, batch_size, "qk"),
            "recurrent": matrix_state(self.parallel, batch_size, self.num_heads, dim, dim),
        }

    @classmethod
    @override
    def check(cls, config: PLSTMConfig, hidden_size: int) -> None:
        if config.head_dim % config.transition_size:
            raise ValueError(
                f"transition_size is {config.transition_size}, which does not divide head_dim "
                f"{config.head_dim}"
            )

    @classmethod
    @override
    def num_parameters(cls, config: PLSTMConfig, hidden_size: int) -> int:
        width, turns = config.num_heads * config.head_dim, _turns(config)
        matrices = hidden_size * (5 * width + config.num_heads * turns)
        gates = config.num_heads * (turns + 3 * config.transition_size**2)
        return matrices + gates + 2 * config.conv_size * width + config.head_dim

    @classmethod
    @override
    def flops_per_token(cls, config: PLSTMConfig, hidden_size: int, seq_len: int) -> int:
        dim, size, chunk = config.head_dim, config.transition_size, config.chunk_size
        if size == 1:
            mixing = linear_attention_flops(dim, dim, chunk)
        else:
            products = 2 * size**3 * (chunk + 2)
            pairs = 2 * chunk * (dim + size * dim)
            mixing = products + pairs + 4 * dim * dim + 3 * 2 * size * dim
        matrices = hidden_size * config.num_heads * (5 * dim + _turns(config))
        return 2 * matrices + config.num_heads * mixing

    @classmethod
    @override
    def state_bytes(cls, config: PLSTMConfig, hidden_size: int, seq_len: int) -> int:
        dim = config.head_dim
        return config.num_heads * (4 * dim * dim + 4 * max(config.conv_size - 1, 0) * dim)


def _turns(config: PLSTMConfig) -> int:
    """Return the numbers that a head's transition is made of."""
    size = config.transition_size
    return size if size == 1 else size + 2 * size**2


def _log_tanh(x: Tensor) -> Tensor:
    """Return log tanh(x) of x > 0, with a floor at which x is zero, exact where tanh is near 1."""
    small = torch.exp(-2 * x.clamp_min(torch.finfo(x.dtype).eps))
    return torch.log1p(-small) - torch.log1p(small)


def _around_minus_five(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw from a Gaussian around -5."""
    return torch.randn(shape, generator=generator) - 5.0
