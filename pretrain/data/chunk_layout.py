"""How packed sequences are cut into chunks that ops handle side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pretrain.data.sequences import Sequences


@dataclass(frozen=True)
class ChunkLayout:
    """A cut of sequences into chunks, ordered so that step j holds the j-th chunk of each sequence.

    Every sequence starts a new chunk, so a chunk never straddles two sequences and a sequence's
    arithmetic does not depend on its neighbours. Longer sequences come first: the sequences that
    still run at step j are a prefix, as in ``torch.nn.utils.rnn.PackedSequence``.

    Attributes:
        token_index: ``[num_chunks, chunk_size]`` int64, index of the token, or T at padding.
        steps: For each step, (first chunk, number of chunks).
        order: ``[N]`` int64, the sequences, longest first.
        token_slot: ``[T]`` int64, position of each token in the flattened chunks.
        padded: Whether any chunk has padding.
        in_order: Whether the chunks are the tokens in their original order, without padding.
        equal: N where all sequences have the same number of chunks and there is no padding, else 0.
    """

    token_index: Tensor
    steps: list[tuple[int, int]]
    order: Tensor
    token_slot: Tensor
    padded: bool
    in_order: bool
    equal: int


def chunk_layout(sequences: Sequences, chunk_size: int) -> ChunkLayout:
    """Return the cut of ``sequences``; see :meth:`.Sequences.chunk_layout`."""
    lengths, total, device = sequences.lengths, sequences.num_tokens, sequences.device
    host = torch.device("cpu")
    sizes = torch.tensor(lengths, dtype=torch.int64, device=host)
    counts = (sizes + chunk_size - 1) // chunk_size
    order = torch.argsort(counts, descending=True, stable=True)
    ordered = counts[order]
    num_steps = int(ordered[0]) if len(lengths) else 0
    alive = (ordered[None, :] > torch.arange(num_steps, device=host)[:, None]).sum(1)
    firsts = torch.cumsum(alive, 0) - alive
    steps = list(zip(firsts.tolist(), alive.tolist(), strict=True))

    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=host)
    step_of = torch.repeat_interleave(torch.arange(num_steps, device=host), alive)
    sequence_of = order[torch.arange(len(step_of), device=host) - firsts[step_of]]
    offsets = step_of[:, None] * chunk_size + torch.arange(chunk_size, device=host)
    starts = torch.cumsum(sizes, 0) - sizes
    index = starts[sequence_of][:, None] + offsets
    index = index.masked_fill(offsets >= sizes[sequence_of][:, None], total)

    slot = torch.empty(total + 1, dtype=torch.int64, device=host)
    slot[index.reshape(-1)] = torch.arange(index.numel(), device=host)
    return ChunkLayout(
        token_index=index.to(device),
        steps=steps,
        order=order.to(device),
        token_slot=slot[:total].to(device),
        padded=index.numel() != total,
        in_order=index.numel() == total and len(lengths) == 1,
        equal=len(lengths) if index.numel() == total and len(set(lengths)) == 1 else 0,
    )
