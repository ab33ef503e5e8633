"""Linear time-invariant systems of one input and one output, one for each channel.

    x_t = A x_{t-1} + b u_t;         y_t = c x_t

A is diagonal and complex, each mode standing for a pair of conjugates (S4D, arXiv 2206.11893), or a
real matrix (S4, arXiv 2111.00396).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.across import crossing
from pretrain.ops.lti.chunked import chunked_lti, fft_lti
from pretrain.ops.lti.definition import recurrent_dense_lti, recurrent_lti
from pretrain.ops.lti.maps import ChunkMaps, as_complex, as_real, dense_maps, diagonal_maps
from pretrain.ops.shared.arguments import (
    check_shapes,
    choose_backend,
    resolve_sequences,
    resolve_state,
)
from pretrain.ops.shared.autocast import without_autocast
from pretrain.ops.shared.chunk_decay import chunk_tokens

BACKENDS = ("auto", "recurrent", "chunked", "fft")


@without_autocast
def lti(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    final_state: bool = True,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Run a diagonal system over every channel: y_t = 2 Re sum c x_t.

    u ``[B, T, H]``; log_a, b, c: complex ``[H, M]``, of each channel M modes, each of which counts
    with its conjugate; the real part of log_a is at most 0. With ``sequences`` (or their tensor
    ``cu_seqlens`` ``[N + 1]``) B must be 1 and N sequences are packed along T; ``initial_state`` is
    then ``[N, H, 2 M]``, otherwise ``[B, H, 2 M]``: each mode's real part, then its imaginary one.

    backend: ``recurrent`` is the definition, a plain loop; ``chunked`` (and ``auto``) is parallel
    over chunks of ``chunk_size`` tokens; ``fft`` convolves whole rows, where each is one sequence.
    Returns the output in u's dtype and the final state, float32 or wider, None where not wanted.
    Raises ValueError for what does not fit and for an unknown backend.
    """
    _check_input("lti", u)
    modes = log_a.shape[-1]
    shape = (u.shape[2], modes)
    check_shapes("lti", {"log_a": (log_a, shape), "b": (b, shape), "c": (c, shape)})
    for name, tensor in (("log_a", log_a), ("b", b), ("c", c)):
        if not tensor.is_complex():
            raise ValueError(f"lti: {name} is {tensor.dtype}, expected complex numbers")
    wide = torch.promote_types(u.dtype, torch.float32).to_complex()
    # An exponential that is 0 anyway: 0 times -inf would be no number.
    log_a = log_a.to(wide)
    least = -800.0 if wide == torch.complex128 else -110.0
    log_a = torch.complex(log_a.real.clamp_min(least), log_a.imag)
    b, c = b.to(wide), c.to(wide)

    def definition(u: Tensor, state: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        y, state = recurrent_lti(u, log_a.exp(), b, c, as_complex(state), sequences)
        return y, as_real(state)

    return _run(
        "lti",
        u,
        2 * modes,
        "sequences, channels, 2 x modes",
        definition,
        lambda size: diagonal_maps(log_a, b, c, size),
        initial_state,
        resolve_sequences("lti", u.shape[0], u.shape[1], u.device, sequences, cu_seqlens),
        sequences is not None or cu_seqlens is not None,
        final_state,
        backend,
        chunk_size,
        doubling=False,
    )


@without_autocast
def dense_lti(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    final_state: bool = True,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """Run a system of a dense matrix over every channel.

    u ``[B, T, H]``; a ``[H, S, S]``, b, c ``[H, S]``, all real; states are ``[N or B, H, S]``.
    ``chunk_size`` is rounded up to a power of two. All else is as in :func:`lti`.
    """
    _check_input("dense_lti", u)
    size = b.shape[-1]
    shape = (u.shape[2], size)
    check_shapes("dense_lti", {"a": (a, (*shape, size)), "b": (b, shape), "c": (c, shape)})
    wide = torch.promote_types(u.dtype, torch.float32)
    a, b, c = a.to(wide), b.to(wide), c.to(wide)
    return _run(
        "dense_lti",
        u,
        size,
        "sequences, channels, states",
        lambda u, state, sequences: recurrent_dense_lti(u, a, b, c, state, sequences),
        lambda size: dense_maps(a, b, c, size),
        initial_state,
        resolve_sequences("dense_lti", u.shape[0], u.shape[1], u.device, sequences, cu_seqlens),
        sequences is not None or cu_seqlens is not None,
        final_state,
        backend,
        chunk_size,
        doubling=True,
    )


def _check_input(op: str, u: Tensor) -> None:
    if u.ndim != 3:
        raise ValueError(f"{op}: u is {tuple(u.shape)}, expected [B, T, channels]")


def _run(
    op: str,
    u: Tensor,
    states: int,
    axes: str,
    definition: Callable[[Tensor, Tensor, Sequences], tuple[Tensor, Tensor]],
    maps: Callable[[int], ChunkMaps],
    initial_state: Tensor | None,
    sequences: Sequences,
    packed: bool,
    final_state: bool,
    backend: str,
    chunk_size: int,
    *,
    doubling: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run a system by its ``definition`` or its ``maps``, which are given for a number of tokens.

    ``doubling``: whether that number is a power of two.
    """
    backend = choose_backend(op, backend, BACKENDS, "recurrent", "chunked")
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {chunk_size}, expected at least 1")
    if crossing(sequences) is not None:
        raise ValueError(
            f"{op}: the sequences are a segment of a row, expected whole ones: hand the state over"
        )
    batch_size, length, channels = u.shape
    state = resolve_state(op, initial_state, (sequences.count, channels, states), u, axes)
    wide = u.to(state.dtype)
    if backend == "fft":
        if packed and sequences.count > 1:
            raise ValueError(
                f"{op}: backend 'fft' takes rows of one sequence each, found {sequences.count} "
                "packed in one; 'chunked' takes them"
            )
        size = chunk_tokens(length, 1, length, doubling)
        y, last = fft_lti(wide, maps(size), state)
        return y.to(u.dtype), last if final_state else None
    wide = wide.flatten(0, 1)
    found: Tensor | None
    if backend == "recurrent":
        y, found = definition(wide, state, sequences)
    else:
        size = chunk_tokens(chunk_size, 1, sequences.max_length, doubling)
        y, found = chunked_lti(wide, maps(size), state, sequences, size, final_state=final_state)
    return y.to(u.dtype).view(batch_size, length, channels), found if final_state else None
