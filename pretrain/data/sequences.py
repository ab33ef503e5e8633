"""Where sequences begin and end in a packed row of tokens, and how to cut them into chunks.

``cu_seqlens`` is an int32 or int64 tensor ``[N + 1]``: 0, then the running sum of the lengths of
the N sequences packed one after another. What the layers derive from it is computed once per tensor
and remembered while that tensor lives, so a ``cu_seqlens`` must not be changed in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

R = TypeVar("R")


class remember(Generic[R]):
    """Cache a function's results on its first argument, a tensor, by identity."""

    def __init__(self, function: Callable[..., R]):
        self._function = function
        self._results: Any = WeakIdKeyDictionary()
        update_wrapper(self, function)

    def __call__(self, cu_seqlens: Tensor, *arguments: Any) -> R:
        known = self._results.setdefault(cu_seqlens, {})
        if arguments not in known:
            with torch.inference_mode(False):  # what is remembered must serve training too
                known[arguments] = self._function(cu_seqlens, *arguments)
        return known[arguments]

    def learn(self, cu_seqlens: Tensor, result: R) -> None:
        """Remember what is known from elsewhere, of a call without further arguments."""
        self._results.setdefault(cu_seqlens, {})[()] = result


@remember
def sequence_lengths(cu_seqlens: Tensor) -> list[int]:
    """The lengths of the packed sequences, on the host. Raises ValueError for a bad tensor."""
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be a vector of integers [N + 1], found {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}"
        )
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    if ends[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must start at 0 and never fall, found {ends[:20]}")
    return lengths


@remember
def cu_seqlens_on_host(cu_seqlens: Tensor) -> Tensor:
    """The same ``[N + 1]`` int64 on the CPU, without asking the device once more."""
    return torch.tensor([0, *itertools.accumulate(sequence_lengths(cu_seqlens))])


def without_waiting(x: Tensor, device: torch.device) -> Tensor:
    """``x``, which is on the CPU, on ``device``; a GPU copies from pinned memory by itself."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def to_device(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """``cu_seqlens``, which is on the CPU, on ``device``; its lengths stay known, so that no layer
    has to wait for the device to learn them."""
    moved = without_waiting(cu_seqlens, device)
    if moved is not cu_seqlens:
        sequence_lengths.learn(moved, sequence_lengths(cu_seqlens))
    return moved


@remember
def last_tokens(cu_seqlens: Tensor, count: int) -> Tensor:
    """The indices of each sequence's last ``count`` tokens, or of all that it has."""
    ends = itertools.accumulate(sequence_lengths(cu_seqlens))
    parts = [
        torch.arange(end - min(n, count), end)
        for n, end in zip(sequence_lengths(cu_seqlens), ends, strict=True)
    ]
    return without_waiting(torch.cat(parts or [torch.arange(0)]), cu_seqlens.device)


@remember
def max_length(cu_seqlens: Tensor) -> int:
    """The longest packed sequence."""
    return max(sequence_lengths(cu_seqlens), default=0)


@remember
def sequence_ids(cu_seqlens: Tensor) -> Tensor:
    """``[T]`` int64: the sequence that each token belongs to."""
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(lengths, output_size=sum(sequence_lengths(cu_seqlens)))


@remember
def token_positions(cu_seqlens: Tensor) -> Tensor:
    """``[T]`` int64: each token's position within its own sequence, from 0."""
    ids = sequence_ids(cu_seqlens)
    return torch.arange(len(ids), device=ids.device) - cu_seqlens.long()[ids]


def rows_as_sequences(batch_size: int, length: int, device: torch.device) -> Tensor:
    """``cu_seqlens`` of ``batch_size`` rows of equal length laid one after another, the lengths
    being known without asking the device."""
    rows = torch.arange(batch_size + 1, device=device, dtype=torch.int64) * length
    if not rows.is_meta:
        sequence_lengths.learn(rows, [length] * batch_size)
    return rows


def select_packed(x: Tensor, lengths: Tensor, indices: Tensor) -> Tensor:
    """Of sequences of ``lengths`` ``[N]``, packed along the first axis, those of ``indices``
    ``[M]`` in that order, packed likewise."""
    chosen = lengths[indices]
    starts = (lengths.cumsum(0) - lengths)[indices]
    within = torch.arange(int(chosen.sum()), device=x.device)
    within = within - torch.repeat_interleave(chosen.cumsum(0) - chosen, chosen)
    return x[torch.repeat_interleave(starts, chosen) + within]


@dataclass(frozen=True)
class ChunkLayout:
    """Sequences cut into chunks, ordered so that step j holds the j-th chunk of each sequence.

    Every sequence starts a chunk of its own, so a chunk never straddles two sequences and a
    sequence's arithmetic does not depend on its neighbours. Longer sequences come first: the
    sequences that still run at step j are a prefix, as in ``torch.nn.utils.rnn.PackedSequence``.

    token_index:  [num_chunks, chunk_size] int64, index of the token, or T at padding
    steps:        for each step, (first chunk, number of chunks)
    order:        [N] int64, the sequences, longest first
    token_slot:   [T] int64, position of each token in the flattened chunks
    padded:       whether any chunk has padding
    in_order:     whether the chunks are the tokens in their own order, without padding
    """

    token_index: Tensor
    steps: list[tuple[int, int]]
    order: Tensor
    token_slot: Tensor
    padded: bool
    in_order: bool


@remember
def chunk_layout(cu_seqlens: Tensor, chunk_size: int) -> ChunkLayout:
    """The :class:`ChunkLayout` of packed sequences; empty sequences have no chunk."""
    lengths = sequence_lengths(cu_seqlens)
    device, total = cu_seqlens.device, sum(lengths)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    counts = (sizes + chunk_size - 1) // chunk_size
    order = torch.argsort(counts, descending=True, stable=True)
    ordered = counts[order]
    num_steps = int(ordered[0]) if len(lengths) else 0
    alive = (ordered[None, :] > torch.arange(num_steps)[:, None]).sum(1)
    firsts = torch.cumsum(alive, 0) - alive
    steps = list(zip(firsts.tolist(), alive.tolist(), strict=True))

    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    step_of = torch.repeat_interleave(torch.arange(num_steps), alive)
    sequence_of = order[torch.arange(len(step_of)) - firsts[step_of]]
    offsets = step_of[:, None] * chunk_size + torch.arange(chunk_size)
    starts = torch.cumsum(sizes, 0) - sizes
    index = starts[sequence_of][:, None] + offsets
    index = index.masked_fill(offsets >= sizes[sequence_of][:, None], total)

    slot = torch.empty(total + 1, dtype=torch.int64)
    slot[index.reshape(-1)] = torch.arange(index.numel())
    return ChunkLayout(
        token_index=index.to(device),
        steps=steps,
        order=order.to(device),
        token_slot=slot[:total].to(device),
        padded=index.numel() != total,
        in_order=index.numel() == total and len(lengths) == 1,
    )
