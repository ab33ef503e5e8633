"""Recurrences whose transition is diagonal plus low rank (DPLR), with two keys of their own.

    S_t = Diag(a_t) S_{t-1} + p_t^T (e_t S_{t-1}) + k_t^T v_t;         o_t = scale * q_t S_t

The erase key e reads the state before its decay, and what it has read is written at p. RWKV-7
(arXiv 2503.14456) is this recurrence. Two more are made of it: Gated DeltaNet-2, a delta rule with
gates per channel, and Comba (arXiv 2506.02475). With p = beta k and e = -k a it is the delta rule,
with e = 0 linear attention.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.across import crossing
from pretrain.ops.dplr.chunked import chunked_dplr
from pretrain.ops.dplr.definition import recurrent_dplr
from pretrain.ops.matrix_segments import by_columns
from pretrain.ops.shared.arguments import (
    check_heads,
    check_shapes,
    choose_backend,
    decay_shape,
    resolve_sequences,
    resolve_state,
)
from pretrain.ops.shared.autocast import without_autocast
from pretrain.ops.shared.fla_low_rank import fla_comba, fla_dplr, fla_gdn2
from pretrain.ops.shared.flash_linear_attention import check_fla, fla_fits
from pretrain.ops.shared.recomputation import recomputed

BACKENDS = ("auto", "recurrent", "chunked", "fla")


@without_autocast
def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor,
    write: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute a recurrence over a matrix state whose transition is diagonal plus low rank.

    q, k, erase, write: ``[B, T, H, K]``, where no ``write`` means k, for half of the work; v: ``[B,
    T, H, V]``; log_decay: ``[B, T, H]`` or ``[B, T, H, K]``, at most 0. ``scale`` defaults to
    K^-1/2.

    With ``sequences`` (or their tensor ``cu_seqlens`` ``[N + 1]``) B must be 1 and N sequences are
    packed along T; ``initial_state`` is then ``[N, H, K, V]``, otherwise ``[B, H, K, V]``.

    backend: ``recurrent`` is the definition, a plain loop; ``chunked`` is parallel over chunks of
    ``chunk_size`` tokens (rounded up to a power of two where decays are per channel); ``fla`` is
    flash-linear-attention's kernel (bfloat16 and float16), whose chunks are long where no log-decay
    is less than ``lower_bound``. ``auto`` takes ``fla`` on CUDA where it can, ``chunked``
    elsewhere, ``recurrent`` where every sequence is a single token.

    Returns the output ``[B, T, H, V]`` in q's dtype and the final state, float32 or wider. Raises
    ValueError for shapes that do not fit and for an unknown backend.
    """
    check_heads("dplr", q, v)
    shapes = {
        "k": (k, q.shape),
        "v": (v, (*q.shape[:3], v.shape[-1])),
        "erase": (erase, q.shape),
        "write": (write, q.shape),
        "log_decay": (log_decay, decay_shape(q, log_decay)),
    }
    check_shapes("dplr", shapes)
    _check_chunks("dplr", chunk_size)
    batch_size, length, num_heads, head_dim = q.shape
    value_dim, as_rows = v.shape[-1], sequences is None and cu_seqlens is None
    sequences = resolve_sequences("dplr", batch_size, length, q.device, sequences, cu_seqlens)
    from_zeros = initial_state is None
    initial_state = _start("dplr", initial_state, sequences, q, v)
    scale = head_dim**-0.5 if scale is None else scale
    segment = crossing(sequences)
    fast = _fast(sequences, fla_fits(q))
    backend = choose_backend("dplr", backend, BACKENDS, "recurrent", fast)
    if segment is not None:
        run = partial(
            dplr, scale=scale, backend=backend, chunk_size=chunk_size, lower_bound=lower_bound
        )
        tensors = (q, k, v, erase, write)
        return by_columns(run, tensors, log_decay, initial_state, sequences, segment)
    dtype = initial_state.dtype
    if backend == "fla":
        check_fla("dplr", q)
        k, v, erase = (recomputed(Tensor.to, x, q.dtype) for x in (k, v, erase))
        return fla_dplr(
            (q, k, v, erase, k if write is None else recomputed(Tensor.to, write, q.dtype)),
            None if log_decay is None else log_decay.to(dtype),
            scale,
            initial_state,
            None if as_rows else sequences,
            from_zeros=from_zeros,
            lower_bound=lower_bound,
        )
    arguments = (
        q.flatten(0, 1).to(dtype) * scale,
        k.flatten(0, 1).to(dtype),
        v.flatten(0, 1).to(dtype),
        erase.flatten(0, 1).to(dtype),
        None if write is None else write.flatten(0, 1).to(dtype),
        None if log_decay is None else log_decay.flatten(0, 1).to(dtype),
        initial_state,
        sequences,
    )
    if backend == "recurrent":
        output, state = recurrent_dplr(*arguments)
    else:
        output, state = chunked_dplr(*arguments, chunk_size)
    return output.to(q.dtype).view(batch_size, length, num_heads, value_dim), state


@without_autocast
def gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase_gate: Tensor,
    write_gate: Tensor,
    *,
    log_decay: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Compute Gated DeltaNet-2's recurrence, a delta rule with gates per channel.

        S <- Diag(a_t) S;  S <- S + k_t^T (w_t v_t - (b_t k_t) S);         o_t = scale * q_t S

    q, k, erase_gate (b) and log_decay: ``[B, T, H, K]``; v and write_gate (w): ``[B, T, H, V]``.
    The rest is as in :func:`dplr`, which computes it where ``fla``'s kernel does not.
    """
    check_heads("gdn2", q, v)
    shapes = {
        "k": (k, q.shape),
        "v": (v, (*q.shape[:3], v.shape[-1])),
        "erase_gate": (erase_gate, q.shape),
        "write_gate": (write_gate, v.shape),
        "log_decay": (log_decay, q.shape),
    }
    check_shapes("gdn2", shapes)
    _check_chunks("gdn2", chunk_size)
    as_rows = sequences is None and cu_seqlens is None
    sequences = resolve_sequences("gdn2", q.shape[0], q.shape[1], q.device, sequences, cu_seqlens)
    from_zeros = initial_state is None
    initial_state = _start("gdn2", initial_state, sequences, q, v)
    dtype = initial_state.dtype
    fast = _fast(sequences, fla_fits(q))
    backend = choose_backend("gdn2", backend, BACKENDS, "recurrent", fast)
    if backend == "fla" and crossing(sequences) is None:
        check_fla("gdn2", q)
        k, v, *gates = (recomputed(Tensor.to, x, q.dtype) for x in (k, v, erase_gate, write_gate))
        return fla_gdn2(
            (q, k, v, *gates),
            log_decay.to(dtype),
            q.shape[-1] ** -0.5 if scale is None else scale,
            initial_state,
            None if as_rows else sequences,
            from_zeros=from_zeros,
        )
    key, decay = k.to(dtype), log_decay.to(dtype)
    return dplr(
        q,
        key,
        write_gate.to(dtype) * v.to(dtype),
        -erase_gate.to(dtype) * key * decay.exp(),
        log_decay=decay,
        scale=scale,
        initial_state=initial_state,
        sequences=None if as_rows else sequences,
        backend=backend,
        chunk_size=chunk_size,
    )


@without_autocast
def comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Compute Comba's recurrence, a delta rule that erases by another key than it writes.

        S <- a_t S;  S <- S + k_t^T b_t (v_t - e_t S);         o_t = scale * q_t S

    q, k, erase (e): ``[B, T, H, K]``; v: ``[B, T, H, V]``; beta (b), log_decay: ``[B, T, H]``. The
    rest is as in :func:`dplr`, which computes it where ``fla``'s kernel does not.
    """
    check_heads("comba", q, v)
    shapes = {
        "k": (k, q.shape),
        "v": (v, (*q.shape[:3], v.shape[-1])),
        "erase": (erase, q.shape),
        "beta": (beta, q.shape[:3]),
        "log_decay": (log_decay, q.shape[:3]),
    }
    check_shapes("comba", shapes)
    _check_chunks("comba", chunk_size)
    as_rows = sequences is None and cu_seqlens is None
    sequences = resolve_sequences("comba", q.shape[0], q.shape[1], q.device, sequences, cu_seqlens)
    from_zeros = initial_state is None
    initial_state = _start("comba", initial_state, sequences, q, v)
    dtype = initial_state.dtype
    fast = _fast(sequences, fla_fits(q, decay_per_head=True))
    backend = choose_backend("comba", backend, BACKENDS, "recurrent", fast)
    if backend == "fla" and crossing(sequences) is None:
        check_fla("comba", q)
        k, v, erase, beta = (recomputed(Tensor.to, x, q.dtype) for x in (k, v, erase, beta))
        return fla_comba(
            (q, k, v, erase, beta),
            log_decay.to(dtype),
            q.shape[-1] ** -0.5 if scale is None else scale,
            initial_state,
            None if as_rows else sequences,
            from_zeros=from_zeros,
        )
    return dplr(
        q,
        beta.to(dtype)[..., None] * k.to(dtype),
        v,
        -erase,
        log_decay=log_decay,
        scale=scale,
        initial_state=initial_state,
        sequences=None if as_rows else sequences,
        backend=backend,
        chunk_size=chunk_size,
    )


def _start(
    op: str, initial_state: Tensor | None, sequences: Sequences, q: Tensor, v: Tensor
) -> Tensor:
    shape = (sequences.count, q.shape[2], q.shape[3], v.shape[3])
    return resolve_state(op, initial_state, shape, q, "sequences, heads, key dim, value dim")


def _fast(sequences: Sequences, fits: bool) -> str:
    """Return the backend that ``auto`` takes."""
    if sequences.max_length <= 1 and crossing(sequences) is None:
        return "recurrent"
    return "fla" if fits else "chunked"


def _check_chunks(op: str, chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {chunk_size}, expected at least 1")
