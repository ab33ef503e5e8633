"""Long sequences cut into tiles of time, which are solved one after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences


@dataclass(frozen=True)
class Tiles:
    """The layout of tokens in slots ``[positions, chunks]``, and the chunks of each tile.

    Attributes:
        positions: m, tokens of a chunk.
        chunks: n, chunks of all sequences.
        token: ``[m * n]`` token of each slot (any at padding).
        padding: slots without a token.
        slot: ``[T]`` slot of each token.
        tiles: (first chunk, counts of chunks per step) of each tile.
        before: for each tile the chunk before each of its chunks after the first step, or None
            where that is simply as many back as the step has.
        ends: slot of each sequence's last token, or -1.
        order: sequences by rank.
        sequence: ``[n]`` sequence of each chunk.
    """

    positions: int
    chunks: int
    token: Tensor
    padding: Tensor
    slot: Tensor
    tiles: list[tuple[int, list[int]]]
    before: list[Tensor | None]
    ends: Tensor
    order: Tensor
    sequence: Tensor


def tiles_of(sequences: Sequences, dim: int, device_type: str, shooting: bool) -> Tiles:
    """Return the tiles of ``sequences`` for ``dim`` channels on a device of this type.

    They are computed once per batch; shooting wants larger ones, of longer chunks.
    """
    return sequences.derive(_tiles_of, dim, device_type, shooting)


def _tiles_of(sequences: Sequences, dim: int, device_type: str, shooting: bool) -> Tiles:
    longest, num_sequences = sequences.max_length, sequences.count
    # A tile's few arrays should stay in a CPU's cache; a GPU prefers to do all at once.
    elements = (2**20 if shooting else 2**18) if device_type == "cpu" else 2**26
    tile_length = max(64, min(longest, elements // max(1, num_sequences * dim)))
    usual = max(32, round(tile_length**0.5)) if shooting else round((tile_length / 2) ** 0.5)
    m = max(1, min(longest, usual))
    steps_per_tile = max(1, round(tile_length / m))
    layout = sequences.chunk_layout(m)
    n, total = len(layout.token_index), len(layout.token_slot)
    index = layout.token_index.t().reshape(-1)
    padding = (index == total).nonzero()[:, 0]
    slot = layout.token_slot % m * n + layout.token_slot // m
    counts = [count for _, count in layout.steps]
    tiles, ranks = [], []
    before: list[Tensor | None] = []
    for i in range(0, len(counts), steps_per_tile):
        inner = counts[i : i + steps_per_tile]
        tiles.append((layout.steps[i][0], inner))
        ranks += [torch.arange(count) for count in inner]
        if inner[-1] == inner[0]:
            before.append(None)  # shifting by a whole step is enough
        else:
            first = [0, *torch.tensor(inner).cumsum(0).tolist()]
            shifts = [torch.arange(a, a + c) for a, c in zip(first, inner[1:], strict=False)]
            before.append(torch.cat(shifts).to(sequences.device))
    order = layout.order
    rank = torch.cat(ranks).to(order.device) if ranks else order[:0]
    last = sequences.cu_seqlens[1:].long() - 1
    ends = torch.where(sequences.sizes > 0, slot[last.clamp_min(0)] if total else last, -1)
    return Tiles(
        m,
        n,
        index.clamp_max(max(total - 1, 0)),
        padding,
        slot,
        tiles,
        before,
        ends,
        order,
        order[rank],
    )


def previous_states(h: Tensor, start: Tensor, counts: list[int], before: Tensor | None) -> Tensor:
    """Return the states before those of a tile: h ``[S, m, n, D]``, start ``[S, N, D]`` by rank."""
    previous = torch.empty_like(h)
    previous[:, 1:] = h[:, :-1]
    previous[:, 0, : counts[0]] = start[:, : counts[0]]
    if before is None:
        previous[:, 0, counts[0] :] = h[:, -1, : h.shape[2] - counts[0]]
    else:
        previous[:, 0, counts[0] :] = h[:, -1].index_select(1, before)
    return previous


def arrange(x: Tensor, tiles: Tiles) -> Tensor:
    """Arrange tokens ``[T, G, D]`` in the layout of tiles, ``[G, m, n, D]``, zeros at padding."""
    if not len(x):
        return x.new_zeros(x.shape[1], tiles.positions, 0, x.shape[2])
    inner = x.transpose(0, 1).index_select(1, tiles.token)
    if len(tiles.padding):
        inner[:, tiles.padding] = 0
    return inner.unflatten(1, (tiles.positions, tiles.chunks))


def arrange_gradient(states: Tensor, d_states: Tensor, d_final: Tensor, tiles: Tiles) -> Tensor:
    """Arrange the gradients of all states ``[T, S, D]`` and of the last ``[N, S, D]``.

    The result is as ``states`` ``[S, m, n, D]``, zeros at padding.
    """
    gradient = torch.zeros_like(states)
    flat = gradient.flatten(1, 2)
    flat[:, tiles.slot] = d_states.transpose(0, 1)
    ended = tiles.ends >= 0
    flat[:, tiles.ends[ended]] += d_final[ended].transpose(0, 1)
    return gradient


def last_states(states: Tensor, initial_state: Tensor, tiles: Tiles) -> Tensor:
    """Return the last of ``states`` ``[S, m, n, D]`` of each sequence, ``[N, S, D]``.

    Of a sequence without tokens that is its ``initial_state``.
    """
    final = initial_state.clone()
    ended = tiles.ends >= 0
    final[ended] = states.flatten(1, 2)[:, tiles.ends[ended]].transpose(0, 1)
    return final
