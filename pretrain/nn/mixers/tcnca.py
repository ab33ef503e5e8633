"""A gated block of dilated convolutions and attention in chunks, in the style of TCNCA.

    x' = x; x' <- x' + ReLU(conv_l(x')), dilations 1, f, f^2, ...;  z = SiLU(W_z x')
    q = kappa_q * z + mu_q;  k = kappa_k * z + mu_k;  v = SiLU(W_v x)
    o = attention(q, k, v) inside chunks;  h = SiLU(W_h x' + W_o (SiLU(W_g x') * o))
    y = phi * h + (1 - phi) * x;  phi = sigmoid(W_phi x')

All but the first line is MEGA's block (arXiv 2209.10655), whose moving average TCNCA (arXiv
2312.05605) replaces by a dilated temporal convolution network. That paper's details are not public:
the convolutions here are depthwise and residual, and each head has its own kappa and mu over one z.
Linear maps have biases. Positions inside a chunk are rotary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences, without_waiting
from pretrain.nn.linear import (
    ReplicatedLinear,
    column_input,
    column_linear,
    head_shared,
    row_linear,
)
from pretrain.nn.mixers.base import (
    LayerContext,
    Mixer,
    MixerCard,
    MixerConfig,
    State,
    heads,
    register,
    states_wanted,
)
from pretrain.nn.mixers.parts import conv_init
from pretrain.nn.mixers.sizes import heads_for, integral, split_width
from pretrain.nn.mixers.slices import contiguous, cut
from pretrain.nn.parameters import (
    constant,
    normal,
    replicated_parameter,
    sharded_parameter,
    used_on_local_tokens,
)
from pretrain.ops import apply_rotary, attention, rotary_embedding, short_convolution
from pretrain.ops.elementwise.fusing import fused


@dataclass(frozen=True)
class TCNCAConfig(MixerConfig):
    """Settings of the block, whose values are ``num_heads * head_dim`` wide."""

    expand: float = setting(1.0, above=0)
    """Width of all values as a multiple of the model's."""
    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: the width of all values over ``head_dim``."""
    head_dim: Derived = setting(None, minimum=1)
    """Width of z, a query, a key and a value, even; null: 128, a quarter of a smaller width, or
    what divides the width of all values near that."""
    attention_chunk: int = setting(128, minimum=1)
    """Tokens of a chunk, inside which attention sees."""
    conv_layers: int = setting(4, minimum=1)
    """Convolutions, one after another."""
    conv_size: int = setting(17, minimum=2)
    """Taps of each of them."""
    dilation_factor: int = setting(4, minimum=1)
    """What the distance of taps is multiplied by from convolution to convolution, from 1 on."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        width = integral(hidden_size * self.expand, "hidden_size * expand")
        num_heads, head_dim = self.num_heads, self.head_dim
        if num_heads is None and head_dim is None:
            num_heads, head_dim = split_width(width, 128, even=True)
        num_heads = num_heads or heads_for(width, head_dim)
        head_dim = head_dim or integral(width / num_heads, "hidden_size * expand / num_heads")
        return replace(self, num_heads=num_heads, head_dim=head_dim)

    @property
    def width(self) -> int:
        """Return the width of all values."""
        return self.num_heads * self.head_dim

    @property
    def dilations(self) -> list[int]:
        """Return the distance of taps in each convolution."""
        return [self.dilation_factor**layer for layer in range(self.conv_layers)]


@register("tcnca")
class TCNCA(Mixer):
    """Dilated convolutions and chunked attention, as a mixer.

    Its state is the last inputs of every convolution; of the chunk that is not full yet z
    ``[N, c - 1, D]`` and v ``[N, c - 1, H, D]``, and how many tokens they are of.
    """

    config_class = TCNCAConfig
    exact_states = ("z", "v")
    card = MixerCard(
        "TCNCA-style block",
        "x' = TCN(x);  o_t = sum_{j<=t in t's chunk} softmax_j(q_t k_j / sqrt D) v_j",
        "(W - 1) d sum_l f^l, and D (H + 1) (c - 1)",
        "dilated convolutions; attention in chunks",
        "arXiv 2312.05605, 2209.10655",
        sharded="H, d",
    )

    def __init__(self, config: TCNCAConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel, dim = context.hidden_size, context.parallel, config.head_dim
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        self.hidden_size = d
        self.channels = parallel.local(d, "hidden_size")
        local = self.num_heads * dim
        for layer in range(config.conv_layers):
            taps = replicated_parameter(parallel, (d, config.conv_size), conv_init, decay=False)
            self.register_parameter(f"conv_{layer}", taps)
            bias = replicated_parameter(parallel, (d,), constant(0.0))
            self.register_parameter(f"conv_bias_{layer}", bias)
        self.z_proj = ReplicatedLinear(parallel, d, dim, context.std)
        self.z_bias = replicated_parameter(parallel, (dim,), constant(0.0))
        self.v_proj = column_linear(parallel, d, config.width, context.std)
        self.v_bias = sharded_parameter(parallel, (local,), constant(0.0))
        self.g_proj = column_linear(parallel, d, config.width, context.std)
        self.g_bias = sharded_parameter(parallel, (local,), constant(0.0))
        # kappa and mu of queries, then of keys.
        shape = (self.num_heads, 2, dim)
        self.kappa = sharded_parameter(parallel, shape, normal(0.02), decay=False)
        self.mu = sharded_parameter(parallel, shape, constant(0.0), decay=False)
        self.o_proj = row_linear(parallel, config.width, d, context.output_std)
        self.h_proj = row_linear(parallel, d, d, context.output_std)
        self.phi_proj = row_linear(parallel, d, d, context.std)
        biases = (replicated_parameter(parallel, (d,), constant(0.0)) for _ in range(2))
        self.h_bias, self.phi_bias = (used_on_local_tokens(bias, parallel) for bias in biases)

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        own, new_state = x, State()
        x = column_input(x, self.parallel, self)
        mixed = self._convolved(x.transpose(0, 1), sequences, state, new_state).transpose(0, 1)
        z = _activated(self.z_proj(mixed), head_shared(self.z_bias, self.parallel))
        v = heads(_activated(self.v_proj(x), self.v_bias), self.num_heads)
        read = self._read(z.transpose(0, 1), v, sequences, state, new_state)
        gated = _activated(self.g_proj(mixed), self.g_bias) * read.transpose(0, 1)
        first = self.parallel.tensor_rank * self.channels
        part = mixed[..., first : first + self.channels]
        h, phi = self.h_proj(part) + self.o_proj(gated), self.phi_proj(part)
        if self.watch is not None:
            self.note(update=(phi + self.phi_bias).detach().sigmoid())
        return _mixed(h, self.h_bias, phi, self.phi_bias, own), new_state

    def _convolved(
        self, x: Tensor, sequences: Sequences | None, state: State | None, new_state: State
    ) -> Tensor:
        """Run x ``[B, T, d]`` through the convolutions."""
        for number, dilation in enumerate(self.config.dilations):
            key = f"{number}_conv"
            weight, bias = (
                head_shared(getattr(self, f"{name}_{number}"), self.parallel)
                for name in ("conv", "conv_bias")
            )
            y, last = short_convolution(
                x,
                weight,
                bias,
                dilation=dilation,
                sequences=sequences,
                initial_state=None if state is None else state[key],
                final_state=states_wanted(),
            )
            x = _rectified(x, y)
            if last is not None:
                new_state[key] = last
        return x

    def _read(
        self,
        z: Tensor,
        v: Tensor,
        sequences: Sequences | None,
        state: State | None,
        new_state: State,
    ) -> Tensor:
        """Attend inside chunks; z ``[B, T, D]``, v ``[B, T, H, D]`` to ``[B, T, H * D]``."""
        batch_size, length = z.shape[:2]
        chunk = self.config.attention_chunk
        if sequences is None:
            sequences = Sequences.of_rows(batch_size, length, z.device)
        z, v, before, filled = z.flatten(0, 1), v.flatten(0, 1), None, None
        if state is not None:
            filled = state["filled"]
            # A plan has no values: as if a chunk began here.
            before = None if filled.is_meta else filled.tolist()
        if before is None or not any(before):
            keys, order, kept = sequences.derive(_from_borders, chunk)
            slices = sequences.derive(contiguous, chunk, 0)
        else:
            keys, order, kept = _after(sequences, before, chunk)
            slices = cut(sequences, keys, strided=False, size=chunk, shift=0)
        z_all, v_all = z, v
        if order is not None:
            assert state is not None
            z_all = torch.cat([state["z"].flatten(0, 1), z])[order]
            v_all = torch.cat([state["v"].flatten(0, 1), v])[order]
        if states_wanted():
            for name, every in (("z", z_all), ("v", v_all)):
                padded = torch.cat([every, every.new_zeros(1, *every.shape[1:])])
                new_state[name] = padded[kept]
            lengths = sequences.sizes if filled is None else filled + sequences.sizes
            new_state["filled"] = lengths.long() % chunk
        q, k = self._queries(z, 0), self._queries(z_all, 1)
        at = keys.positions % chunk
        cos, sin = rotary_embedding(at, self.config.head_dim, 10_000.0)
        k = apply_rotary(k[None], cos, sin)
        asked = sequences.positions
        if order is not None:
            assert filled is not None
            asked = asked + filled[sequences.ids]
        cos, sin = rotary_embedding(asked % chunk, self.config.head_dim, 10_000.0)
        q = apply_rotary(q[None], cos, sin)
        chosen, queries_of, keys_of = slices[1:]
        v_all = v_all[None]
        if chosen is not None:
            k, v_all = k[:, chosen], v_all[:, chosen]
        y = attention(q, k, v_all, sequences=queries_of, sequences_k=keys_of, watch=self.watch)
        return y.reshape(batch_size, length, self.num_heads * self.config.head_dim)

    def _queries(self, z: Tensor, which: int) -> Tensor:
        """Return queries (0) or keys (1) ``[T, H, D]`` of z ``[T, D]``."""
        return _scaled(z[:, None], self.kappa[:, which], self.mu[:, which])

    @override
    def init_state(self, batch_size: int) -> State:
        config, parallel = self.config, self.parallel
        shapes = {
            f"{number}_conv": ((config.conv_size - 1) * dilation, self.hidden_size)
            for number, dilation in enumerate(config.dilations)
        }
        dim, rest = config.head_dim, config.attention_chunk - 1
        states = {
            name: torch.zeros(batch_size, *shape, dtype=parallel.dtype, device=parallel.device)
            for name, shape in {
                **shapes,
                "z": (rest, dim),
                "v": (rest, self.num_heads, dim),
            }.items()
        }
        filled = torch.zeros(batch_size, dtype=torch.int64, device=parallel.device)
        return {**states, "filled": filled}

    @classmethod
    @override
    def check(cls, config: TCNCAConfig, hidden_size: int) -> None:
        if config.head_dim % 2:
            raise ValueError(
                f"head_dim is {config.head_dim}, expected an even number for rotary positions"
            )

    @classmethod
    @override
    def sharded_counts(cls, config: TCNCAConfig, hidden_size: int) -> dict[str, int]:
        return {"num_heads": config.num_heads, "hidden_size": hidden_size}

    @classmethod
    @override
    def num_parameters(cls, config: TCNCAConfig, hidden_size: int) -> int:
        d, width, dim = hidden_size, config.width, config.head_dim
        matrices = d * (dim + 3 * width + 2 * d) + dim + 2 * width + 2 * d
        return matrices + 4 * width + config.conv_layers * d * (config.conv_size + 1)

    @classmethod
    @override
    def flops_per_token(cls, config: TCNCAConfig, hidden_size: int, seq_len: int) -> int:
        d, width, dim = hidden_size, config.width, config.head_dim
        full, rest = divmod(seq_len, config.attention_chunk)
        chunks = [config.attention_chunk] * full + [rest]
        seen = sum(n * (n + 1) // 2 for n in chunks)
        return 2 * d * (dim + 3 * width + 2 * d) + 4 * width * seen // seq_len

    @classmethod
    @override
    def state_bytes(cls, config: TCNCAConfig, hidden_size: int, seq_len: int) -> int:
        inputs = (config.conv_size - 1) * sum(config.dilations) * hidden_size
        return 2 * (inputs + (config.attention_chunk - 1) * (config.head_dim + config.width)) + 8


Layout = tuple[Sequences, Tensor | None, Tensor]


def _from_borders(sequences: Sequences, chunk: int) -> Layout:
    return _after(sequences, [0] * sequences.count, chunk)


def _after(sequences: Sequences, before: list[int], chunk: int) -> Layout:
    """Put each sequence after the ``before`` tokens of the chunk that it goes on with.

    Returns the sequences of both; the order that brings them there from all states'
    ``chunk - 1`` tokens and then all new ones, None where nothing came before; and, ``[N, chunk -
    1]``, the tokens of each sequence's last chunk if it is not full, then the one beyond all.
    """
    new, device = sequences.lengths, sequences.device
    both = Sequences.from_lengths((a + b for a, b in zip(before, new, strict=True)), device)
    starts, ends = [0], list[int]()
    for length in both.lengths:
        ends.append(starts[-1] + length)
        starts.append(ends[-1])
    past = torch.full((len(new), chunk - 1), starts[-1], dtype=torch.int64)
    for n, (length, end) in enumerate(zip(both.lengths, ends, strict=True)):
        left = length % chunk
        past[n, :left] = torch.arange(end - left, end)
    order = None
    if any(before):
        parts, token = [], len(new) * (chunk - 1)
        for n, (old, length) in enumerate(zip(before, new, strict=True)):
            parts.append(torch.arange(n * (chunk - 1), n * (chunk - 1) + old))
            parts.append(torch.arange(token, token + length))
            token += length
        order = without_waiting(torch.cat(parts), device)
    return both, order, without_waiting(past, device)


@fused
def _activated(x: Tensor, bias: Tensor) -> Tensor:
    return F.silu(x + bias)


@fused
def _rectified(x: Tensor, y: Tensor) -> Tensor:
    return x + F.relu(y)


@fused
def _scaled(z: Tensor, kappa: Tensor, mu: Tensor) -> Tensor:
    return kappa * z + mu


@fused
def _mixed(h: Tensor, h_bias: Tensor, phi: Tensor, phi_bias: Tensor, x: Tensor) -> Tensor:
    """Return ``p * SiLU(h) + (1 - p) * x`` in h's dtype, where ``p = sigmoid(phi)``."""
    p = torch.sigmoid(phi + phi_bias)
    return (p * F.silu(h + h_bias) + (1 - p) * x).to(h.dtype)
