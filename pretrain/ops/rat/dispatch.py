"""RAT (arXiv 2507.04416): a gated average inside chunks of L tokens, softmax attention across them.

    k~_t = g_t k~_{t-1} + (1 - g_t) k_t,  v~ likewise, from 0 at the start of every chunk

q_t attends to (k~, v~) at the end of every earlier chunk and to its own (k~_t, v~_t). Rotary
positions count chunks, so a token and its k~ have the same position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.across import crossing
from pretrain.ops.over_heads import Ends, has_heads, held_sequences, over_heads
from pretrain.ops.rat.chunked import chunked_rat
from pretrain.ops.rat.definition import recurrent_rat
from pretrain.ops.rat.state import RATState
from pretrain.ops.shared.arguments import (
    check_shapes,
    choose_backend,
    resolve_sequences,
)
from pretrain.ops.shared.autocast import without_autocast
from pretrain.ops.shared.watching import Watch

BACKENDS = ("auto", "recurrent", "chunked")


@without_autocast
def rat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    chunk_size: int = 16,
    rope_theta: float | None = 10_000.0,
    scale: float | None = None,
    initial_state: RATState | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    watch: Watch | None = None,
) -> tuple[Tensor, RATState]:
    """Attend across chunks of gated averages.

    q, k, v, gate ``[B, T, H, D]``, the gate in (0, 1); L is ``chunk_size``; ``scale`` defaults to
    D^-1/2. With ``sequences`` (or their tensor ``cu_seqlens`` ``[N + 1]``) B must be 1 and N
    sequences are packed.

    backend: ``recurrent`` is the definition, token by token; ``chunked`` (and ``auto``) advances
    all chunks together. ``watch`` is shown the ``logits`` of chunks' ends and of tokens' own keys.
    Returns the output in v's dtype and the state.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    backend = choose_backend("rat", backend, BACKENDS, "recurrent", "chunked")
    if v.ndim != 4:
        raise ValueError(f"rat: v is {tuple(v.shape)}, expected [B, T, H, D]")
    check_shapes("rat", {"q": (q, v.shape), "k": (k, v.shape), "gate": (gate, v.shape)})
    batch_size, length, num_heads, dim = v.shape
    if chunk_size < 1 or (rope_theta is not None and dim % 2):
        raise ValueError(
            f"rat: chunk_size is {chunk_size} and D {dim}, expected at least 1 and, with rotary "
            "positions, an even number"
        )
    sequences = resolve_sequences("rat", batch_size, length, v.device, sequences, cu_seqlens)
    dtype = torch.promote_types(v.dtype, torch.float32)
    if crossing(sequences) is not None:
        if initial_state is not None:
            raise ValueError(
                "rat: initial_state is given for a segment of a row, expected None: it is not "
                "divided over ranks"
            )
        run = partial(rat, chunk_size=chunk_size, rope_theta=rope_theta, scale=scale)
        if not has_heads(sequences, num_heads):
            watch = None  # zeros stand in
        run = partial(run, backend=backend, watch=watch)
        return _over_heads(run, (q, k, v, gate), sequences, chunk_size)
    state = initial_state
    if state is None:
        zeros = v.new_zeros(sequences.count, num_heads, dim, dtype=dtype)
        empty = zeros[:0]
        seen = torch.zeros(sequences.count, dtype=torch.int64, device=sequences.device)
        state = RATState(empty, empty, zeros, zeros, seen)
    elif state.seen.shape != (sequences.count,):
        raise ValueError(
            f"rat: initial_state has {len(state.seen)} sequences, expected {sequences.count}"
        )
    ends, running = int((state.seen // chunk_size).sum()), (sequences.count, num_heads, dim)
    check_shapes(
        "rat",
        {
            "initial_state.keys": (state.keys, (ends, num_heads, dim)),
            "initial_state.values": (state.values, (ends, num_heads, dim)),
            "initial_state.key": (state.key, running),
            "initial_state.value": (state.value, running),
        },
    )
    q, k, v_wide, gate = (x.flatten(0, 1).to(dtype) for x in (q, k, v, gate))
    q = q * (dim**-0.5 if scale is None else scale)
    form = recurrent_rat if backend == "recurrent" else chunked_rat
    output, state = form(q, k, v_wide, gate, state, sequences, chunk_size, rope_theta, watch)
    return output.to(v.dtype).view(batch_size, length, num_heads, dim), state


def _over_heads(
    run: Callable[..., tuple[Tensor, RATState]],
    tensors: Sequence[Tensor],
    sequences: Sequences,
    chunk_size: int,
) -> tuple[Tensor, RATState]:
    """Run RAT on a segment of a row, every rank on the whole row with some of the heads.

    The state is that after the last token of each sequence that has a piece here.
    """
    lengths: list[int] = []

    def whole(
        inner: Sequence[Tensor], begun: Sequence[Tensor], row: Sequences, heads: slice
    ) -> tuple[Tensor, Ends]:
        output, state = run(*inner, sequences=row)
        lengths.extend(row.lengths)
        chunks, once = [n // chunk_size for n in row.lengths], [1] * row.count
        ends = [(state.keys, chunks), (state.values, chunks), (state.key, once)]
        return output, [*ends, (state.value, once)]

    output, ended = over_heads(sequences, whole, tensors, tensors[0].shape[2])
    seen = torch.tensor(lengths, device=sequences.device)[held_sequences(sequences)]
    keys, values, key, value = ended
    return output, RATState(keys, values, key, value, seen)
