"""Linear attention with decay: linear attention, RetNet, Mamba-2 (SSD), GLA, HGRN2.

    S_t = Diag(a_t) S_{t-1} + k_t^T v_t;         o_t = scale * q_t S_t

The decay a_t is absent, one number per head, or one per key channel. Sources: linear attention
arXiv 2006.16236, RetNet arXiv 2307.08621, GLA arXiv 2312.06635, Mamba-2 arXiv 2405.21060, HGRN2
arXiv 2404.07904.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pretrain.data.sequences import Sequences, pieces_alone
from pretrain.ops.across import crossing
from pretrain.ops.linear_attention.chunked import chunked_linear_attention
from pretrain.ops.linear_attention.definition import recurrent_linear_attention
from pretrain.ops.linear_attention.segmented import segmented_linear_attention
from pretrain.ops.shared.arguments import (
    check_heads,
    check_shapes,
    choose_backend,
    decay_shape,
    resolve_sequences,
    resolve_state,
)
from pretrain.ops.shared.autocast import without_autocast
from pretrain.ops.shared.flash_linear_attention import check_fla, fla_fits, fla_linear_attention
from pretrain.ops.shared.recomputation import recomputed

BACKENDS = ("auto", "recurrent", "chunked", "fla")


@without_autocast
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Compute a linear recurrence over a matrix state.

    q, k: ``[B, T, H, K]``; v: ``[B, T, H, V]``; log_decay: None, ``[B, T, H]`` or
    ``[B, T, H, K]``, at most 0. ``scale`` defaults to K^-1/2. With ``sequences`` (or their
    tensor ``cu_seqlens`` ``[N + 1]``) B must be 1 and N sequences are packed along T;
    ``initial_state`` is then ``[N, H, K, V]``, otherwise ``[B, H, K, V]``.

    backend: ``recurrent`` is the definition, a plain loop; ``chunked`` is parallel over chunks of
    ``chunk_size`` tokens (rounded up to a power of two for decays per channel); ``fla`` is
    flash-linear-attention's kernel (bfloat16 and float16). ``auto`` takes ``fla`` on CUDA where it
    can, ``chunked`` elsewhere, ``recurrent`` where every sequence is a single token.

    Returns the output ``[B, T, H, V]`` in q's dtype and the final state, float32 or wider.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    check_heads("linear_attention", q, v)
    if chunk_size < 1:
        raise ValueError(f"linear_attention: chunk_size is {chunk_size}, expected at least 1")
    batch_size, length, num_heads, head_dim = q.shape
    value_dim, as_rows = v.shape[-1], sequences is None and cu_seqlens is None
    check_shapes(
        "linear_attention",
        {
            "k": (k, q.shape),
            "v": (v, (*q.shape[:3], value_dim)),
            "log_decay": (log_decay, decay_shape(q, log_decay)),
        },
    )
    sequences = resolve_sequences(
        "linear_attention", batch_size, length, q.device, sequences, cu_seqlens
    )
    from_zeros = initial_state is None
    initial_state = resolve_state(
        "linear_attention",
        initial_state,
        (sequences.count, num_heads, head_dim, value_dim),
        q,
        "sequences, heads, key dim, value dim",
    )
    dtype = initial_state.dtype
    scale = head_dim**-0.5 if scale is None else scale
    segment = crossing(sequences)
    if segment is not None:
        run = partial(
            linear_attention,
            q,
            k,
            v,
            log_decay=log_decay,
            scale=scale,
            sequences=pieces_alone(sequences),
            backend=backend,
            chunk_size=chunk_size,
        )
        return segmented_linear_attention(
            lambda state: run(initial_state=state),
            q,
            k,
            v,
            log_decay,
            scale,
            initial_state,
            sequences,
            segment,
        )
    per_head = log_decay is not None and log_decay.ndim == 3
    fast = "fla" if fla_fits(q, decay_per_head=per_head) else "chunked"
    if sequences.max_length <= 1:
        fast = "recurrent"
    backend = choose_backend("linear_attention", backend, BACKENDS, "recurrent", fast)
    if backend == "fla":
        check_fla("linear_attention", q)
        return fla_linear_attention(
            q,
            recomputed(Tensor.to, k, q.dtype),
            recomputed(Tensor.to, v, q.dtype),
            None if log_decay is None else log_decay.to(dtype),
            scale,
            initial_state,
            None if as_rows else sequences,
            from_zeros=from_zeros,
        )
    arguments = (
        q.flatten(0, 1).to(dtype) * scale,
        k.flatten(0, 1).to(dtype),
        v.flatten(0, 1).to(dtype),
        None if log_decay is None else log_decay.flatten(0, 1).to(dtype),
        initial_state,
    )
    if backend == "recurrent":
        output, state = recurrent_linear_attention(*arguments, sequences)
    else:
        output, state = chunked_linear_attention(*arguments, sequences, chunk_size)
    return output.to(q.dtype).view(batch_size, length, num_heads, value_dim), state
