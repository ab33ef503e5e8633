"""What C tokens of a time-invariant system are: one convolution, and maps from and to its state.

With x a state, u a chunk's inputs, and k_l = c A^l b for l = 0 .. C - 1:

    y_i = (c A^{i+1}) x + sum_{j <= i} k_{i-j} u_j;         x' = A^C x + sum_j (A^{C-1-j} b) u_j
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.ops.shared.recomputation import recomputed


@dataclass(frozen=True)
class ChunkMaps:
    """The maps of chunks of C tokens, for H systems of S real states each.

    Attributes:
        kernel: ``[H, C]``, the response to an impulse.
        read: ``[H, C, S]``, of the state before a chunk.
        write: ``[H, C, S]``, to the state after it.
        over_chunk: takes states ``[n, H, S]`` over C tokens without input.
        over_tokens: likewise, each over a number of tokens from 1 to C, ``[n]``.
    """

    kernel: Tensor
    read: Tensor
    write: Tensor
    over_chunk: Callable[[Tensor], Tensor]
    over_tokens: Callable[[Tensor, Tensor], Tensor]


def diagonal_maps(log_a: Tensor, b: Tensor, c: Tensor, size: int) -> ChunkMaps:
    """Return the maps of diagonal systems; log_a, b, c ``[H, M]`` are complex, S is 2 M.

    A state's real and imaginary parts lie side by side.
    """
    kernel, read, write, last = recomputed(_diagonal_tables, log_a, b, c, size)

    def over_chunk(state: Tensor) -> Tensor:
        return as_real(as_complex(state) * last)

    def over_tokens(state: Tensor, tokens: Tensor) -> Tensor:
        return as_real(as_complex(state) * (tokens[:, None, None] * log_a).exp())

    return ChunkMaps(kernel, read, write, over_chunk, over_tokens)


def _diagonal_tables(
    log_a: Tensor, b: Tensor, c: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the kernel, what reads, what writes, and a^C ``[H, M]``.

    Powers are exponentials of multiples of log a: repeated products would add up their errors.
    """
    counts = torch.arange(size + 1, device=log_a.device, dtype=log_a.real.dtype)
    powers = (counts[:, None] * log_a[:, None]).exp()  # [H, C + 1, M]
    read = torch.view_as_real((2 * c[:, None] * powers[:, 1:]).conj().resolve_conj()).flatten(-2)
    write = torch.view_as_real(b[:, None] * powers[:, :-1].flip(1)).flatten(-2)
    first = 2 * (c * b).real.sum(-1, keepdim=True)
    later = (read[:, :-1] * torch.view_as_real(b).flatten(-2)[:, None]).sum(-1)
    return torch.cat([first, later], 1), read, write, powers[:, -1].clone()


def dense_maps(a: Tensor, b: Tensor, c: Tensor, size: int) -> ChunkMaps:
    """Return the maps of systems of matrices a ``[H, S, S]``, with b, c ``[H, S]``, all real.

    ``size`` is a power of two: the powers of a are found by doubling.
    """
    kernel, read, write, *squares = recomputed(_dense_tables, a, b, c, size)
    squares = [a, *squares]

    def over_chunk(state: Tensor) -> Tensor:
        return _times(squares[-1], state)

    def over_tokens(state: Tensor, tokens: Tensor) -> Tensor:
        for bit, square in enumerate(squares):
            has = (tokens >> bit) & 1
            state = torch.where(has[:, None, None] > 0, _times(square, state), state)
        return state

    return ChunkMaps(kernel, read, write, over_chunk, over_tokens)


def _dense_tables(a: Tensor, b: Tensor, c: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return the kernel, what reads, what writes, and a^2, a^4, ..., a^C."""
    squares = [a]
    read, write = (c[:, None] @ a), b[:, None]  # [H, 1, S]
    while read.shape[1] < size:
        read = torch.cat([read, read @ squares[-1]], 1)
        write = torch.cat([write @ squares[-1].mT, write], 1)
        squares.append(squares[-1] @ squares[-1])
    return (write.flip(1) * c[:, None]).sum(-1), read, write, *squares[1:]


def _times(matrix: Tensor, state: Tensor) -> Tensor:
    """Multiply matrices ``[H, S, S]`` by states ``[n, H, S]``."""
    return (state.transpose(0, 1) @ matrix.mT).transpose(0, 1)


def as_complex(state: Tensor) -> Tensor:
    """Return complex states ``[..., M]`` of real ones ``[..., 2 M]``."""
    return torch.view_as_complex(state.unflatten(-1, (-1, 2)).contiguous())


def as_real(state: Tensor) -> Tensor:
    """Return real states ``[..., 2 M]`` of complex ones ``[..., M]``."""
    return torch.view_as_real(state).flatten(-2)


def toeplitz(kernel: Tensor) -> Tensor:
    """Return ``[H, C, C]`` with k_{i-j} of a kernel ``[H, C]`` in row j and column i, 0 below."""
    size = kernel.shape[-1]
    padded = torch.nn.functional.pad(kernel, (size - 1, 0))
    return padded.unfold(-1, size, 1).flip(-2)
