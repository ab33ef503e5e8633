"""JRT-RNN (arXiv 2407.05483): linear attention whose first tokens are seen by all of a document.

    o_t = f(q_t) S_t / f(q_t) n_t;  S_t = sum_{j<=t} f(k_j)^T v_j + sum_{j<E} f(k'_j)^T v'_j

n_t is the same sum without v. f is the second-order Taylor polynomial of exp, of which weights
f(q) f(k) are at least 1/2. The prefix of E tokens, with keys k' and values v' of its own, is what
the state starts from, so that a layer knows what it will be asked before it reads. Inside the
prefix outputs depend on later tokens: training such a model takes another loss than that of the
next token. With E = 0 there is no prefix, and this is normalised linear attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

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
    accumulation_dtype,
    heads,
    register,
)
from pretrain.nn.mixers.parts import linear_attention_flops, matrix_state
from pretrain.nn.mixers.sizes import heads_for, per_head, split_width
from pretrain.ops import linear_attention
from pretrain.ops.elementwise.fusing import fused

_CHUNK = 128  # tokens of prefixes that are summed at once: their features are as much as a state


@dataclass(frozen=True)
class JRTConfig(MixerConfig):
    """Settings of JRT-RNN's layer."""

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: ``hidden_size / head_dim``, where a value has 128 channels, a quarter of a
    smaller width, or what divides the width near that."""
    head_dim: Derived = setting(None, minimum=1)
    """Width V of a value; null: ``hidden_size / num_heads``."""
    feature_dim: int = setting(16, minimum=1)
    """Width d' of a query and of a key, of which the feature map makes ``1 + d' + d'^2``."""
    prefix_length: int = setting(0, minimum=0)
    """Tokens at the start of a document, or of a prompt, that all its positions see; a shorter
    prompt is all prefix, and in training ``data.prefix`` says how much of a document is. Above 0
    the model cannot be trained to predict the next token of that part, which it sees."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, which changes speed alone."""

    @property
    def key_dim(self) -> int:
        """Return the features of a key."""
        return 1 + self.feature_dim + self.feature_dim**2

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = self.num_heads, self.head_dim
        if num_heads is None and head_dim is None:
            num_heads, head_dim = split_width(hidden_size, 128)
        num_heads = num_heads or heads_for(hidden_size, head_dim)
        return replace(
            self, num_heads=num_heads, head_dim=head_dim or per_head(hidden_size, num_heads)
        )


@register("jrt")
class JRT(Mixer):
    """JRT-RNN's layer, as a mixer.

    Its state is S, with n as a last column: ``[N, H, 1 + d' + d'^2, V + 1]`` in float32.
    """

    config_class = JRTConfig
    card = MixerCard(
        "JRT-RNN (prefix linear attention)",
        "S_t = S_{t-1} + f(k_t)^T v_t, from a sum over the prefix;  o_t = f(q_t) S_t / f(q_t) n_t",
        "H (1 + d' + d'^2) (V + 1)",
        "chunks",
        "arXiv 2407.05483",
    )

    def __init__(self, config: JRTConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        k_dim, v_dim = config.num_heads * config.feature_dim, config.num_heads * config.head_dim
        self.q_proj = column_linear(parallel, d, k_dim, context.std)
        self.k_proj = column_linear(parallel, d, k_dim, context.std)
        self.v_proj = column_linear(parallel, d, v_dim, context.std)
        if config.prefix_length:
            self.prefix_k_proj = column_linear(parallel, d, k_dim, context.std)
            self.prefix_v_proj = column_linear(parallel, d, v_dim, context.std)
        self.o_proj = row_linear(parallel, v_dim, d, context.output_std)

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        q, k, v = (heads(getattr(self, f"{name}_proj")(x), self.num_heads) for name in "qkv")
        start = None if state is None else state["recurrent"]
        if start is None and self.config.prefix_length:
            start = self._prefix(x, sequences)
        y, recurrent = linear_attention(
            _features(q),
            _features(k),
            _with_ones(v),
            scale=1.0,
            initial_state=start,
            sequences=sequences,
            chunk_size=self.config.chunk_size,
        )
        y = _ratio(y, v.dtype)
        return self.o_proj(y.flatten(2).transpose(0, 1)), {"recurrent": recurrent}

    def _prefix(self, x: Tensor, sequences: Sequences | None) -> Tensor:
        """Return what each sequence's first tokens add to its state from the start."""
        k, v = (
            heads(projection(x), self.num_heads)
            for projection in (self.prefix_k_proj, self.prefix_v_proj)
        )
        if sequences is None:
            k, v = (t[:, : self.config.prefix_length] for t in (k, v))
            return _sum(_features(k), _with_ones(v))
        first = sequences.derive(_first_tokens, self.config.prefix_length)
        k, v = (t[0][first.tokens] for t in (k, v))  # [P, H, ...]
        k, v = (torch.cat([t, torch.zeros_like(t[:1])]) for t in (_features(k), _with_ones(v)))
        layout = first.sequences.chunk_layout(_CHUNK)
        # Nothing so far, but projections have a gradient even where there is no prefix.
        total = _sum(k[None, :0], v[None, :0]).expand(sequences.count, -1, -1, -1)
        for begin, count in layout.steps:  # chunk j of all sequences that have one
            tokens = layout.token_index[begin : begin + count]
            part = _sum(k[tokens], v[tokens])
            total = total + F.pad(part, (0, 0, 0, 0, 0, 0, 0, sequences.count - count))
        return total[layout.order.argsort()]

    @override
    def init_state(self, batch_size: int) -> State:
        shape = (batch_size, self.num_heads, self.config.key_dim, self.config.head_dim + 1)
        return {"recurrent": matrix_state(self.parallel, *shape)}

    @classmethod
    @override
    def sees_ahead(cls, config: JRTConfig) -> int:
        return config.prefix_length

    @classmethod
    @override
    def num_parameters(cls, config: JRTConfig, hidden_size: int) -> int:
        maps = 2 + (config.prefix_length > 0)
        width = maps * (config.feature_dim + config.head_dim)
        return hidden_size * config.num_heads * width

    @classmethod
    @override
    def flops_per_token(cls, config: JRTConfig, hidden_size: int, seq_len: int) -> int:
        key_dim, value_dim = config.key_dim, config.head_dim + 1
        mixing = linear_attention_flops(key_dim, value_dim, config.chunk_size)
        share = min(config.prefix_length, seq_len) / max(seq_len, 1)
        prefix = round(2 * config.num_heads * key_dim * value_dim * share)
        matrices = cls.num_parameters(config, hidden_size)
        return 2 * matrices + config.num_heads * mixing + prefix

    @classmethod
    @override
    def state_bytes(cls, config: JRTConfig, hidden_size: int, seq_len: int) -> int:
        return 4 * config.num_heads * config.key_dim * (config.head_dim + 1)


class _First(NamedTuple):
    """The first tokens of sequences: ``[P]`` their numbers in the row, and as sequences."""

    tokens: Tensor
    sequences: Sequences


def _first_tokens(sequences: Sequences, most: int) -> _First:
    """Return the prefixes of sequences, of at most so many tokens each."""
    prefixes = sequences.lengths if sequences.prefixes is None else sequences.prefixes
    first = Sequences.from_lengths((min(most, n) for n in prefixes), sequences.device)
    starts = sequences.cu_seqlens[:-1].long()[first.ids]
    return _First(starts + first.positions, first)


def _sum(k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("nehk,nehv->nhkv", k, v.to(k.dtype))


@fused
def _features(x: Tensor) -> Tensor:
    """Return ``[1, x / d'^1/4, vec(x^T x) / sqrt(2 d')]`` of the last axis, float32 or wider.

    So f(q) f(k) is ``1 + u + u^2 / 2`` with ``u = q k / sqrt d'``.
    """
    x = x.to(accumulation_dtype(x.dtype)) * x.shape[-1] ** -0.25
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)


def _with_ones(v: Tensor) -> Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


@fused
def _ratio(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide by the sum of weights, the last column."""
    return (y[..., :-1] / (y[..., -1:] + 1e-12)).to(dtype)
