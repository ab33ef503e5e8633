"""Sliced attention for loops over depth (after SReT, arXiv 2111.05297), made causal.

Every pass attends inside slices of the text, at a fraction of the pairs: the tokens of one stretch
(contiguous), in the next pass those whose positions leave one remainder (strided), and so on in
turn. Every second contiguous pass moves the stretches by half their size, so that neighbours across
a border meet as well. Block b of the model in pass p has form b + p, whether or not it is in a
loop. The paper's slices are of a random order of the tokens of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import setting
from pretrain.data.sequences import Sequences, without_waiting
from pretrain.nn.mixers.attention import Attention, AttentionConfig
from pretrain.nn.mixers.base import LayerContext, MixerCard, register
from pretrain.ops import attention

Slices = tuple[Tensor | None, Tensor | None, Sequences, Sequences]


@dataclass(frozen=True)
class SlicedAttentionConfig(AttentionConfig):
    """Settings of sliced attention, those of ``attn`` without a window, and its slices."""

    slice_size: int = setting(256, minimum=1)
    """Tokens of a contiguous slice."""
    stride: int = setting(16, minimum=1)
    """Distance of neighbours in a strided slice. Both forms see as many keys in texts of
    ``slice_size * stride`` tokens."""
    first: Literal["contiguous", "strided"] = setting("contiguous")
    """Slices of the model's first block in its first pass."""


@register("sliced_attn")
class SlicedAttention(Attention):
    """Sliced attention; see :class:`Attention`. Its state is all keys and values."""

    config_class = SlicedAttentionConfig
    over_time = "state"
    card = MixerCard(
        "sliced attention",
        "o_t = sum_{j<=t in t's slice} softmax_j(q_t k_j / sqrt D) v_j",
        "keys and values of all tokens",
        "flash or scaled-dot-product attention",
        "arXiv 2111.05297",
    )

    def __init__(self, config: SlicedAttentionConfig, context: LayerContext):
        super().__init__(config, context)
        self.config: SlicedAttentionConfig = config
        self.index = context.index

    @override
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, sequences_k: Sequences
    ) -> Tensor:
        form = self.index + self.depth + (self.config.first == "strided")
        if form % 2:
            slices, size, shift = _strided, self.config.stride, 0
        else:
            slices, size = _contiguous, self.config.slice_size
            shift = form // 2 % 2 * (size // 2)
        if sequences_k is sequences:
            found = sequences.derive(slices, size, shift)
        else:
            found = _cut(sequences, sequences_k, strided=bool(form % 2), size=size, shift=shift)
        to_slices, keys, queries_of, keys_of = found
        if to_slices is not None:
            q = q[:, to_slices]
        if keys is not None:
            k, v = k[:, keys], v[:, keys]
        y = attention(q, k, v, scale=self.config.scale, sequences=queries_of, sequences_k=keys_of)
        return y if to_slices is None else y[:, torch.argsort(to_slices)]

    @classmethod
    @override
    def check(cls, config: AttentionConfig, hidden_size: int) -> None:
        if config.window is not None:
            raise ValueError(f"window is {config.window}, expected null: slices limit what is seen")
        super().check(config, hidden_size)

    @classmethod
    @override
    def flops_per_token(cls, config: AttentionConfig, hidden_size: int, seq_len: int) -> int:
        """Return the mean over both forms."""
        assert isinstance(config, SlicedAttentionConfig)
        whole = super().flops_per_token(config, hidden_size, seq_len)
        a_key = 4 * config.num_heads * config.head_dim
        projections = whole - a_key * (seq_len * (seq_len + 1) // 2) // seq_len
        full, rest = divmod(seq_len, config.slice_size)
        stretches = [config.slice_size] * full + [rest]
        each, more = divmod(seq_len, config.stride)
        pairs = sum(n * (n + 1) // 2 for n in stretches)
        pairs += (
            more * (each + 1) * (each + 2) // 2 + (config.stride - more) * each * (each + 1) // 2
        )
        return projections + a_key * pairs // (2 * seq_len)


def _contiguous(sequences: Sequences, size: int, shift: int) -> Slices:
    return _cut(sequences, sequences, strided=False, size=size, shift=shift)


def _strided(sequences: Sequences, size: int, shift: int) -> Slices:
    return _cut(sequences, sequences, strided=True, size=size, shift=shift)


def _cut(queries: Sequences, keys: Sequences, *, strided: bool, size: int, shift: int) -> Slices:
    """Cut sequences, whose queries are their last tokens, into slices that have queries.

    Returns the order that brings queries slice by slice, that for keys (None where it is theirs),
    and both as sequences. In a slice tokens keep their order, so its queries are its last ones.
    """
    device = queries.device
    new, every = (torch.tensor(s.lengths, dtype=torch.int64) for s in (queries, keys))
    owner = torch.repeat_interleave(torch.arange(len(every)), every)
    position = torch.arange(len(owner)) - (every.cumsum(0) - every)[owner]
    part = position % size if strided else (position + shift) // size
    # By sequence, then by slice.
    code = owner * (int(part.max()) + 1 if len(part) else 1) + part
    asked = position >= (every - new)[owner]
    with_queries, sizes = torch.unique(code[asked], return_counts=True)
    found = torch.isin(code, with_queries).nonzero()[:, 0]
    order = found[torch.argsort(code[found], stable=True)]
    sizes_k = torch.unique(code[found], return_counts=True)[1]
    to_slices = torch.argsort(code[asked], stable=True) if strided else None
    whole = not strided and len(found) == len(code)
    queries_of = Sequences.from_lengths(sizes.tolist(), device)
    return (
        None if to_slices is None else without_waiting(to_slices, device),
        None if whole else without_waiting(order, device),
        queries_of,
        queries_of if keys is queries else Sequences.from_lengths(sizes_k.tolist(), device),
    )
