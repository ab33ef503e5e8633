"""Packed sequences cut into slices, inside which an attention sees."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences, without_waiting

Slices = tuple[Tensor | None, Tensor | None, Sequences, Sequences]


def contiguous(sequences: Sequences, size: int, shift: int) -> Slices:
    """Cut every sequence into stretches of ``size`` tokens; the first is shorter by ``shift``."""
    return cut(sequences, sequences, strided=False, size=size, shift=shift)


def strided(sequences: Sequences, size: int, shift: int) -> Slices:
    """Cut every sequence by what its positions leave over from a division by ``size``."""
    return cut(sequences, sequences, strided=True, size=size, shift=shift)


def cut(queries: Sequences, keys: Sequences, *, strided: bool, size: int, shift: int) -> Slices:
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
