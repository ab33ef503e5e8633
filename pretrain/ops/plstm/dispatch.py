"""pLSTM for sequences (arXiv 2506.11997): a state of J parts that small matrices turn.

    o_t = scale * (q_t C_{t-1} M_t^T + (q_t . k_t) v_t D_t^T)
    C_t = C_{t-1} T_t^T + k_t^T v_t S_t^T

The matrices are J x J and act on the J parts of V / J channels that values and states have: the
source S_t writes, the transition T_t turns, the mark M_t reads, and D_t hands on directly. The
state is read before the token is written. With J = 1 it is linear attention with a decay of any
sign, over inputs that are one token late.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.across import crossing
from pretrain.ops.plstm.chunked import chunked_plstm
from pretrain.ops.plstm.definition import recurrent_plstm
from pretrain.ops.plstm.one_part import shifted_plstm
from pretrain.ops.shared.arguments import (
    check_heads,
    check_shapes,
    choose_backend,
    resolve_sequences,
    resolve_state,
)
from pretrain.ops.shared.autocast import without_autocast

BACKENDS = ("auto", "recurrent", "chunked", "shifted")


@without_autocast
def plstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Compute pLSTM over sequences.

    q, k: ``[B, T, H, K]``; v: ``[B, T, H, V]``; source, transition, mark, direct:
    ``[B, T, H, J, J]``, where J divides V. No singular value of a transition should exceed 1.
    ``scale`` defaults to K^-1/2. With ``sequences`` (or their tensor ``cu_seqlens`` ``[N + 1]``) B
    must be 1 and N sequences are packed along T; ``initial_state`` is then ``[N, H, K, V]``,
    otherwise ``[B, H, K, V]``.

    backend: ``recurrent`` is the definition, a plain loop; ``chunked`` is parallel over chunks of
    ``chunk_size`` tokens; ``shifted``, for J = 1, is linear attention; ``auto`` takes that where it
    can, ``chunked`` elsewhere. Returns the output ``[B, T, H, V]`` in q's dtype and the
    final state, float32 or wider. Raises ValueError for shapes that do not fit, for an unknown
    backend, and for a row that is divided over ranks.
    """
    fast = "shifted" if transition.shape[-1] == 1 else "chunked"
    backend = choose_backend("plstm", backend, BACKENDS, "recurrent", fast)
    check_heads("plstm", q, v)
    if chunk_size < 1:
        raise ValueError(f"plstm: chunk_size is {chunk_size}, expected at least 1")
    batch_size, length, num_heads, key_dim = q.shape
    value_dim, size = v.shape[-1], transition.shape[-1]
    if value_dim % size:
        raise ValueError(
            f"plstm: the transition is {size} x {size}, expected a size that divides the "
            f"{value_dim} channels of a value"
        )
    if backend == "shifted" and size != 1:
        raise ValueError(f"plstm: backend 'shifted' needs transitions of size 1, found {size}")
    gates = {"source": source, "transition": transition, "mark": mark, "direct": direct}
    check_shapes(
        "plstm",
        {
            "k": (k, q.shape),
            "v": (v, (*q.shape[:3], value_dim)),
            **{name: (gate, (*q.shape[:3], size, size)) for name, gate in gates.items()},
        },
    )
    sequences = resolve_sequences("plstm", batch_size, length, q.device, sequences, cu_seqlens)
    if crossing(sequences) is not None:
        raise ValueError(
            "plstm: the sequences are a segment of a row that is divided over ranks, expected "
            "whole sequences, or pieces of them with the state that they continue from"
        )
    state = resolve_state(
        "plstm",
        initial_state,
        (sequences.count, num_heads, key_dim, value_dim),
        q,
        "sequences, heads, key dim, value dim",
    )
    q_wide, k, v, *parts = (x.flatten(0, 1).to(state.dtype) for x in (q, k, v, *gates.values()))
    arguments = (
        q_wide * (key_dim**-0.5 if scale is None else scale),
        k,
        v.unflatten(-1, (size, value_dim // size)),
        (parts[0], parts[1], parts[2], parts[3]),
        state.unflatten(-1, (size, value_dim // size)),
        sequences,
    )
    if backend == "recurrent":
        output, state = recurrent_plstm(*arguments)
    else:
        form = shifted_plstm if backend == "shifted" else chunked_plstm
        output, state = form(*arguments, chunk_size)
    output = output.to(q.dtype).reshape(batch_size, length, num_heads, value_dim)
    return output, state.flatten(3)
