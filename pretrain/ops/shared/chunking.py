"""Tokens to chunks and back, by gathers whose way back is a gather too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import ChunkLayout


def to_chunks(x: Tensor, layout: ChunkLayout, *, head_axis: int) -> Tensor:
    """Cut ``[T, ..., H, ...]`` into ``[chunks, H, tokens per chunk, ...]``, zeros at padding.

    ``head_axis`` is the index of H once the token axis has become (chunks, tokens per chunk).
    """
    return _ToChunks.apply(x, layout, head_axis)


def _gather(x: Tensor, layout: ChunkLayout) -> Tensor:
    """Gather ``[T, ...]`` into ``[chunks, tokens per chunk, ...]``, zeros at padding."""
    if layout.in_order:
        return x.unflatten(0, layout.token_index.shape)
    if layout.padded:
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    # index_select, as everywhere here: x[index] takes a CPU four times as long.
    return x.index_select(0, layout.token_index.flatten()).unflatten(0, layout.token_index.shape)


def _chunks(x: Tensor, layout: ChunkLayout, head_axis: int) -> Tensor:
    """Cut as :func:`to_chunks` does."""
    if not _equal(layout):
        return _gather(x, layout).movedim(head_axis, 1).contiguous()
    size = layout.token_index.shape[1]
    by_step = x.unflatten(0, (layout.equal, len(layout.steps), size)).transpose(0, 1)
    return by_step.movedim(head_axis + 1, 2).flatten(0, 1).contiguous()


def _equal(layout: ChunkLayout) -> bool:
    """Return whether the cut only exchanges axes, which takes one copy instead of two."""
    return layout.equal > 1 and len(layout.steps) > 1


def _tokens(x: Tensor, layout: ChunkLayout) -> Tensor:
    """Gather ``[chunks, tokens per chunk, ...]`` back to ``[T, ...]``."""
    if _equal(layout):
        return x.unflatten(0, (-1, layout.equal)).transpose(0, 1).flatten(0, 2)
    flat = x.flatten(0, 1)
    return flat if layout.in_order else flat.index_select(0, layout.token_slot)


class _ToChunks(torch.autograd.Function):
    """Tokens to chunks: every token has one slot, so backward is a gather too, no slow scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: ChunkLayout, head_axis: int) -> Tensor:
        ctx.layout, ctx.head_axis = layout, head_axis
        return _chunks(x, layout, head_axis)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_chunks: Tensor) -> tuple[Tensor, None, None]:
        return _tokens(d_chunks.movedim(1, ctx.head_axis), ctx.layout), None, None


class _FromChunks(torch.autograd.Function):
    """Chunks ``[chunks, H, tokens per chunk, V]`` to tokens ``[T, H, V]``."""

    @staticmethod
    def forward(ctx: Any, chunks: Tensor, layout: ChunkLayout) -> Tensor:
        ctx.layout = layout
        return _tokens(chunks.transpose(1, 2), layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, None]:
        return _chunks(d_output, ctx.layout, 2), None


def from_chunks(chunks: Tensor, layout: ChunkLayout) -> Tensor:
    """Return ``[T, H, V]`` of ``[chunks, H, tokens per chunk, V]``."""
    return _FromChunks.apply(chunks, layout)
