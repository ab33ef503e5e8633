"""Softmax attention with grouped key/value heads, rotary positions, optional sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences, pieces_alone, select_packed
from pretrain.nn.linear import column_input, column_linear, group_linear, head_shared, row_linear
from pretrain.nn.maximal_update import Role
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
from pretrain.nn.mixers.conversion import QKVO, Conversion
from pretrain.nn.mixers.sizes import attention_heads
from pretrain.nn.norm import sharded_rms_norm
from pretrain.nn.parameters import constant, replicated_parameter, sharded_parameter
from pretrain.ops import apply_rotary, attention, rotary_embedding, rotary_of
from pretrain.ops.across import crossing, halo
from pretrain.ops.elementwise.gating import sigmoid_gate
from pretrain.ops.elementwise.rms_norm import rms_norm
from pretrain.parallel.segments import keys_so_far, together


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Settings of softmax attention."""

    head_counts: ClassVar[tuple[str, ...]] = ("num_heads", "num_kv_heads")

    num_heads: Derived = setting(None, minimum=1)
    """Heads of queries; null: ``hidden_size / head_dim``, where a head has 64 channels, 128 from a
    width of 2048, or a quarter of a smaller width, or what divides the width near that."""
    num_kv_heads: Derived = setting(None, minimum=1)
    """Heads of keys and values, a divisor of ``num_heads`` (arXiv 2305.13245); null: as many."""
    head_dim: Derived = setting(None, minimum=1)
    """Channels of a head; null: ``hidden_size / num_heads``."""
    rope_theta: float | None = setting(10_000.0, above=0)
    """Base of rotary positions (arXiv 2104.09864); null: no positions (NoPE)."""
    window: int | None = setting(None, minimum=1)
    """Tokens that a token sees, itself included; null: all before it."""
    qk_norm: bool = False
    """Whether queries and keys go through an RMS norm."""
    qk_norm_over: Literal["head", "width"] = "head"
    """What that norm is over: every head by itself, or all heads of queries together, and all of
    keys (arXiv 2501.00656)."""
    norm_eps: float = setting(1e-6, above=0)
    """Added to the mean square in that norm."""
    rotary_dim: int | None = setting(None, minimum=2)
    """Leading channels of a head that rotate, an even number; null: all."""
    output_gate: bool = False
    """Whether the output is multiplied by a sigmoid of a projection of the input."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases."""
    scale: float | None = setting(None, above=0)
    """Factor of the products of queries and keys; null: ``head_dim ** -0.5``."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = attention_heads(
            hidden_size, self.num_heads, self.head_dim, self.num_kv_heads
        )
        return replace(
            self,
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads or num_heads,
            head_dim=head_dim,
        )


def _same_but_window(attention: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """Return the settings of attention that takes over another one's weights."""
    names = {field.name for field in fields(AttentionConfig)} - {"window"}
    return {name: attention[name] for name in names}


@register("attn")
class Attention(Mixer):
    """Softmax attention, as a mixer.

    Its state is the keys and values so far (with a window, the last ``window``), packed ``[S, Hkv,
    D]``; how many of them each sequence has, and how many tokens it has seen.
    """

    config_class = AttentionConfig
    counts_tokens = True
    over_time: ClassVar[Literal["state", "ops", "cells"]] = "ops"
    conversion = Conversion(_same_but_window, QKVO, rest=True)
    card = MixerCard(
        "softmax attention",
        "o_t = sum_j softmax_j(q_t k_j / sqrt D) v_j",
        "keys and values of all tokens",
        "flash or scaled-dot-product attention",
        "arXiv 1706.03762; GQA 2305.13245; RoPE 2104.09864",
    )

    def __init__(self, config: AttentionConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        if config.window is None:
            self.growing_states = ("k", "v")
        else:
            self.windowed_states, self.state_window = ("k", "v"), config.window
        d = context.hidden_size
        num_heads, num_kv_heads, self.head_dim = _shape(config)
        self.num_heads = self.parallel.local(num_heads, "num_heads")
        self.num_kv_heads = max(num_kv_heads // self.parallel.tensor_size, 1)
        q_dim = num_heads * self.head_dim
        self.q_proj = column_linear(self.parallel, d, q_dim, context.std)
        keys: Any = (self.parallel, d, num_kv_heads, self.head_dim, context.std, "num_kv_heads")
        # With the model the key heads become more too, unless all heads share one.
        role: Role = "bottleneck" if num_kv_heads == 1 < num_heads else "hidden"
        self.k_proj, self.v_proj = group_linear(*keys, role=role), group_linear(*keys, role=role)
        self.o_proj = row_linear(self.parallel, q_dim, d, context.output_std)
        # Of which every process has a copy, beside its own heads.
        self._shared = "kv" if num_kv_heads < self.parallel.tensor_size else ""
        if config.output_gate:
            self.g_proj = column_linear(self.parallel, d, q_dim, context.std)
        if config.qkv_bias:
            self._add_biases()
        self._whole_norm = config.qk_norm and config.qk_norm_over == "width"
        if self._whole_norm:
            self._add_whole_norms()
        elif config.qk_norm:
            self.q_norm = replicated_parameter(self.parallel, (self.head_dim,), constant(1.0))
            self.k_norm = replicated_parameter(self.parallel, (self.head_dim,), constant(1.0))

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        gate = self.g_proj(x) if self.config.output_gate else None
        q = heads(self._projected("q", x), self.num_heads)
        k = heads(self._projected("k", x), self.num_kv_heads)
        v = heads(self._projected("v", x), self.num_kv_heads)
        if self.config.qk_norm and not self._whole_norm:
            q = rms_norm(q, head_shared(self.q_norm, self.parallel), self.config.norm_eps)
            k = rms_norm(k, head_shared(self.k_norm, self.parallel), self.config.norm_eps)
        batch_size, length = q.shape[:2]
        if sequences is None:
            sequences = Sequences.of_rows(batch_size, length, q.device)
            q, k, v = (t.reshape(1, batch_size * length, *t.shape[2:]) for t in (q, k, v))
        if self.config.rope_theta is not None:
            dim, theta = self.config.rotary_dim or self.head_dim, self.config.rope_theta
            if state is None:
                cos, sin = rotary_of(sequences, dim, theta)
            else:
                seen = torch.repeat_interleave(state["seen"], sequences.sizes)
                cos, sin = rotary_embedding(sequences.positions + seen, dim, theta)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        counted = sequences
        k, v, sequences_k = k[0], v[0], sequences
        if state is not None:
            if crossing(sequences) is not None:
                k, v, state = self._from_before(k, v, sequences, state)
                sequences = pieces_alone(sequences)
            k, v, sequences_k = _append(state, k, v, sequences)
        if gate is not None and self.watch is not None:
            self.note(output=gate.detach().sigmoid())
        y = self.attend(q, k[None], v[None], sequences, sequences_k)
        y = y.reshape(batch_size, length, self.num_heads * self.head_dim).transpose(0, 1)
        if gate is not None:
            y = sigmoid_gate(y, gate)
        if not states_wanted():
            return self.o_proj(y), {}
        seen = counted.sizes_so_far if state is None else counted.sizes_so_far + state["seen"]
        if sequences.segment is not None and state is None:
            k, v, sequences_k = keys_so_far(k, v, sequences, self.config.window)
            y, k, v = together(y, k, v)
        return self.o_proj(y), {**self._visible(k, v, sequences_k), "seen": seen}

    def _from_before(
        self, k: Tensor, v: Tensor, sequences: Sequences, state: State
    ) -> tuple[Tensor, Tensor, State]:
        """Return the keys and values of a segment, and its state with those of segments before.

        They are the first piece's last ones, of tokens in this row and of rows before it, which
        the rank has where the row begins. ``state["seen"]`` of that piece counts the latter.
        """
        segment, history = sequences.segment, self.state_window - 1
        assert segment is not None
        if self.config.window is None:
            raise ValueError(
                "attention without a window takes the keys of a row's segments from that row "
                "alone, found a state; expected none, or a window"
            )
        lengths = state["lengths"].tolist()
        rows, own = torch.cat([k, v], -1), torch.cat([state["k"], state["v"]], -1)
        start = own[len(own) - lengths[-1] :][-history:] if history else own[:0]
        start = torch.cat([start.new_zeros(history - len(start), *start.shape[1:]), start])
        before, rows = halo(sequences, rows, history, start)
        k, v = rows.chunk(2, -1)
        if not segment.continues[segment.rank]:
            return k, v, state
        count = min(history, segment.seen + int(state["seen"][0]))
        own = torch.cat([before[len(before) - count :], own])
        old_k, old_v = own.chunk(2, -1)
        counts = state["lengths"].clone()
        counts[0] = count
        return k, v, {**state, "k": old_k, "v": old_v, "lengths": counts}

    def _add_whole_norms(self) -> None:
        for name, count in (("q", self.num_heads), ("k", self.num_kv_heads)):
            make = replicated_parameter if name in self._shared else sharded_parameter
            weight = make(self.parallel, (count * self.head_dim,), constant(1.0), decay=False)
            self.register_parameter(f"{name}_norm", weight)

    def _add_biases(self) -> None:
        for name in "qkv":
            make = replicated_parameter if name in self._shared else sharded_parameter
            count = self.num_heads if name == "q" else self.num_kv_heads
            bias = make(self.parallel, (count * self.head_dim,), constant(0.0), decay=False)
            self.register_parameter(f"{name}_bias", bias)

    def _projected(self, name: str, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, f"{name}_proj")(x)
        shared = name in self._shared
        if self.config.qkv_bias:
            bias: Tensor = getattr(self, f"{name}_bias")
            y = y + (head_shared(bias, self.parallel) if shared else bias)
        if name == "v" or not self._whole_norm:
            return y
        weight: Tensor = getattr(self, f"{name}_norm")
        if shared:  # every process has all of it
            return rms_norm(y, head_shared(weight, self.parallel), self.config.norm_eps)
        return sharded_rms_norm(y, weight, self.config.norm_eps, self.parallel)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, sequences_k: Sequences
    ) -> Tensor:
        """Attend from q ``[1, T, H, D]``, the last tokens of sequences whose keys are k and v."""
        return attention(
            q,
            k,
            v,
            window=self.config.window,
            scale=self.config.scale,
            sequences=sequences,
            sequences_k=sequences_k,
            watch=self.watch,
        )

    def _visible(self, k: Tensor, v: Tensor, sequences: Sequences) -> State:
        """Return the keys and values that later tokens can still attend to."""
        lengths, window = sequences.sizes, self.config.window
        if window is not None and sequences.max_length > window:
            kept = sequences.last_tokens(window)
            k, v, lengths = k[kept], v[kept], lengths.clamp_max(window)
        return {"k": k, "v": v, "lengths": lengths}

    @override
    def carried_state(
        self, x: Tensor, sequences: Sequences | None, state: State, made: State
    ) -> State:
        """Append the keys and values of the last pass: those of a deeper one would be the same."""
        if sequences is None:
            sequences = Sequences.of_rows(x.shape[1], x.shape[0], x.device)
        have = made["lengths"].tolist()
        new = [min(a, b) for a, b in zip(sequences.lengths, have, strict=True)]
        k, v = (
            torch.cat(
                [
                    part[len(part) - count :]
                    for part, count in zip(made[name].split(have), new, strict=True)
                ]
            )
            for name in "kv"
        )
        k, v, both = _append(state, k, v, Sequences.from_lengths(new, k.device))
        return {**self._visible(k, v, both), "seen": made["seen"]}

    @override
    def shortened_state(self, state: State, tokens: int) -> State | None:
        if self.config.window is not None or len(state["lengths"]) != 1:
            return None
        kept = len(state["k"]) - tokens
        counts = {name: state[name] - tokens for name in ("lengths", "seen")}
        return {"k": state["k"][:kept], "v": state["v"][:kept], **counts}

    @override
    def init_state(self, batch_size: int) -> State:
        device, dtype = self.parallel.device, self.parallel.dtype
        empty = torch.zeros(0, self.num_kv_heads, self.head_dim, dtype=dtype, device=device)
        lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return {"k": empty, "v": empty, "lengths": lengths, "seen": lengths}

    @override
    def select_state(self, state: State, indices: Tensor) -> State:
        lengths = state["lengths"]
        k, v = (select_packed(state[name], lengths, indices) for name in "kv")
        return {"k": k, "v": v, "lengths": lengths[indices], "seen": state["seen"][indices]}

    @classmethod
    @override
    def check(cls, config: AttentionConfig, hidden_size: int) -> None:
        num_heads, num_kv_heads, head_dim = _shape(config)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {num_kv_heads}, which does not divide num_heads {num_heads}"
            )
        if config.rope_theta is not None and head_dim % 2:
            raise ValueError(
                f"head_dim is {head_dim}, expected an even number for rotary positions"
            )
        if config.qk_norm_over == "width" and not config.qk_norm:
            raise ValueError("qk_norm_over is width, but qk_norm is false: nothing is normalised")
        if (dim := config.rotary_dim) is not None:
            if config.rope_theta is None:
                raise ValueError(f"rotary_dim is {dim}, but rope_theta is null: nothing rotates")
            if dim % 2 or dim > head_dim:
                raise ValueError(
                    f"rotary_dim is {dim}, expected an even number up to head_dim = {head_dim}"
                )

    @classmethod
    @override
    def sharded_counts(cls, config: AttentionConfig, hidden_size: int) -> dict[str, int]:
        num_heads, num_kv_heads, _ = _shape(config)
        return {"num_heads": num_heads, "num_kv_heads": num_kv_heads}

    @classmethod
    @override
    def num_parameters(cls, config: AttentionConfig, hidden_size: int) -> int:
        num_heads, num_kv_heads, head_dim = _shape(config)
        widths = 2 * (num_heads + num_kv_heads) + config.output_gate * num_heads
        biases = config.qkv_bias * head_dim * (num_heads + 2 * num_kv_heads)
        normed = num_heads + num_kv_heads if config.qk_norm_over == "width" else 2
        return hidden_size * head_dim * widths + biases + normed * head_dim * config.qk_norm

    @classmethod
    @override
    def flops_per_token(cls, config: AttentionConfig, hidden_size: int, seq_len: int) -> int:
        num_heads, num_kv_heads, head_dim = _shape(config)
        widths = 2 * (num_heads + num_kv_heads) + config.output_gate * num_heads
        projections = 2 * hidden_size * head_dim * widths
        window = min(config.window or seq_len, seq_len)
        # Keys seen by all queries of a sequence: 1, 2, ..., window, window, ...
        seen = window * (window + 1) // 2 + (seq_len - window) * window
        return projections + 4 * num_heads * head_dim * seen // seq_len

    @classmethod
    @override
    def state_bytes(cls, config: AttentionConfig, hidden_size: int, seq_len: int) -> int:
        _, num_kv_heads, head_dim = _shape(config)
        return 4 * num_kv_heads * head_dim * min(config.window or seq_len, seq_len)


def _shape(config: AttentionConfig) -> tuple[int, int, int]:
    return config.num_heads, config.num_kv_heads, config.head_dim


def _append(
    state: State, k: Tensor, v: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor, Sequences]:
    """Return each sequence's new keys and values after its old ones, and where sequences lie."""
    new, old = sequences.lengths, state["lengths"].tolist()
    parts = [
        torch.cat([torch.cat(pair) for pair in zip(a.split(old), b.split(new), strict=True)])
        for a, b in ((state["k"], k), (state["v"], v))
    ]
    both = Sequences.from_lengths((a + b for a, b in zip(old, new, strict=True)), k.device)
    return parts[0], parts[1], both
