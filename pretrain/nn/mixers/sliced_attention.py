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
from pretrain.data.sequences import Sequences
from pretrain.nn.mixers.attention import Attention, AttentionConfig
from pretrain.nn.mixers.base import LayerContext, MixerCard, register
from pretrain.nn.mixers.slices import contiguous, cut, strided
from pretrain.ops import attention


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
            form_of, size, shift = strided, self.config.stride, 0
        else:
            form_of, size = contiguous, self.config.slice_size
            shift = form // 2 % 2 * (size // 2)
        if sequences_k is sequences:
            found = sequences.derive(form_of, size, shift)
        else:
            found = cut(sequences, sequences_k, strided=bool(form % 2), size=size, shift=shift)
        to_slices, keys, queries_of, keys_of = found
        if to_slices is not None:
            q = q[:, to_slices]
        if keys is not None:
            k, v = k[:, keys], v[:, keys]
        y = attention(
            q,
            k,
            v,
            scale=self.config.scale,
            sequences=queries_of,
            sequences_k=keys_of,
            watch=self.watch,
        )
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
