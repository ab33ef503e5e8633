"""Time-invariant systems parallel over chunks of time, and over whole rows by FFT."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import ChunkLayout, Sequences, without_waiting
from pretrain.ops.lti.maps import ChunkMaps, toeplitz
from pretrain.ops.shared.chunking import from_chunks, to_chunks


def chunked_lti(
    u: Tensor,
    maps: ChunkMaps,
    initial_state: Tensor,
    sequences: Sequences,
    chunk_size: int,
    *,
    final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute systems chunk by chunk; ``maps`` are those of ``chunk_size`` tokens.

    u ``[T, H]``, initial_state ``[N, H, S]``. Returns the output ``[T, H]`` and the final states.
    """
    layout = sequences.chunk_layout(chunk_size)
    chunks = to_chunks(u, layout, head_axis=2).transpose(0, 1)  # [H, n, C]
    added = (chunks @ maps.write).transpose(0, 1)  # [n, H, S]
    starts, state = _starts(maps, added, initial_state[layout.order], layout)
    output = chunks @ toeplitz(maps.kernel) + starts.transpose(0, 1) @ maps.read.mT
    result = from_chunks(output.transpose(0, 1)[..., None], layout)[..., 0]
    if not final_state:
        return result, None
    state = state[torch.argsort(layout.order)]
    if layout.padded:
        # The loop took the last chunks' padding for tokens.
        owners, last, lengths, tokens = sequences.derive(_tails, chunk_size)
        ends = torch.cat([u, u.new_zeros(1, u.shape[1])]).index_select(0, tokens.flatten())
        ends = ends.unflatten(0, tokens.shape).permute(2, 0, 1)  # [H, sequences, C]
        tail = maps.over_tokens(starts.index_select(0, last), lengths)
        tail = tail + (ends @ maps.write).transpose(0, 1)
        state = initial_state.index_copy(0, owners, tail)
    return result, state


def _starts(
    maps: ChunkMaps, added: Tensor, state: Tensor, layout: ChunkLayout
) -> tuple[Tensor, Tensor]:
    """Return the state before each chunk ``[n, H, S]``, and that after all, in layout's order."""
    starts, ended = [], []
    for part in added.split([count for _, count in layout.steps]):
        if len(part) < len(state):
            ended.append(state[len(part) :])
            state = state[: len(part)]
        starts.append(state)
        state = maps.over_chunk(state) + part
    return torch.cat(starts) if starts else added, torch.cat([state, *reversed(ended)])


def _tails(sequences: Sequences, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the ends of sequences that have tokens are made of.

    They are: these sequences' numbers; their last chunks; how many tokens those have; and which
    ``[N, size]``, at the end of their row behind T for none.
    """
    lengths, layout = sequences.lengths, sequences.chunk_layout(size)
    order, last = layout.order.tolist(), {}
    for first, count in layout.steps:
        last.update({order[i]: first + i for i in range(count)})
    owners = sorted(last)
    ends = torch.tensor(lengths, device="cpu").cumsum(0)[owners]
    tails = torch.tensor([(lengths[n] - 1) % size + 1 for n in owners], device="cpu")
    back = torch.arange(size, 0, -1, device="cpu")  # from the sequence's end
    tokens = (ends[:, None] - back).masked_fill(back > tails[:, None], sequences.num_tokens)
    chunks = torch.tensor([last[n] for n in owners], device="cpu")
    numbers = torch.tensor(owners, device="cpu")
    device = sequences.device
    return (
        without_waiting(numbers, device),
        without_waiting(chunks, device),
        without_waiting(tails, device),
        without_waiting(tokens, device),
    )


def fft_lti(u: Tensor, maps: ChunkMaps, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute systems over whole rows u ``[B, T, H]``; ``maps`` are those of T tokens or more.

    initial_state is ``[B, H, S]``. Returns the output ``[B, T, H]`` and the final states.
    """
    length = u.shape[1]
    if not length:
        return u, initial_state
    rows = u.permute(2, 0, 1)  # [H, B, T]
    size = 2 * length  # nothing wraps around
    kernel = maps.kernel[:, None, :length]
    output = torch.fft.irfft(torch.fft.rfft(rows, size) * torch.fft.rfft(kernel, size), size)
    read, write = maps.read[:, :length], maps.write[:, -length:]
    output = output[..., :length] + initial_state.transpose(0, 1) @ read.mT
    counts = torch.full((len(u),), length, device=u.device)
    state = maps.over_tokens(initial_state, counts) + (rows @ write).transpose(0, 1)
    return output.permute(1, 2, 0), state
