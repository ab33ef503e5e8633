"""The delta rule: DeltaNet, Gated DeltaNet, Kimi delta attention and (Gated) DeltaProduct.

    S_t = a_t S_{t-1};  then for each of the n Householder steps j of token t:
    S_t <- S_t + k_j^T b_j (v_j - k_j S_t);         o_t = scale * q_t S_t

The decay a_t is one number per head, or one per key channel (a diagonal matrix). Sources: DeltaNet
arXiv 2406.06484, Gated DeltaNet arXiv 2412.06464, Kimi Linear arXiv 2510.26692, DeltaProduct
arXiv 2502.10297.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.across import crossing
from pretrain.ops.delta_rule.chunked import chunked_delta_rule
from pretrain.ops.delta_rule.definition import recurrent_delta_rule
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
from pretrain.ops.shared.flash_linear_attention import check_fla, fla_delta_rule, fla_fits
from pretrain.ops.shared.recomputation import recomputed

BACKENDS = ("auto", "recurrent", "chunked", "fla")


@without_autocast
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    num_householder: int = 1,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Compute a delta-rule recurrence over a matrix state.

    q: ``[B, T, H, K]``; k: ``[B, n T, H, K]``; v: ``[B, n T, H, V]``; beta: ``[B, n T, H]``, where
    n is ``num_householder`` and the n sub-steps of a token follow each other in time; log_decay:
    ``[B, T, H]`` or ``[B, T, H, K]``, at most 0, applied before the first sub-step of its token.
    Keys should have norm at most 1 where beta may exceed 1. ``scale`` defaults to K^-1/2.

    With ``sequences`` (or their tensor ``cu_seqlens`` ``[N + 1]``; in tokens, not sub-steps) B must
    be 1 and N sequences are packed along T; ``initial_state`` is then ``[N, H, K, V]``, otherwise
    ``[B, H, K, V]``.

    backend: ``recurrent`` is the definition, a plain loop; ``chunked`` is parallel over chunks of
    ``chunk_size`` sub-steps (rounded up to a power of two tokens where decays are per channel);
    ``fla`` is flash-linear-attention's kernel (bfloat16 and float16; one sub-step where decays are
    per channel). ``auto`` takes ``fla`` on CUDA where it can, ``chunked`` elsewhere, ``recurrent``
    where every sequence is a single token.

    Returns the output ``[B, T, H, V]`` in q's dtype and the final state, float32 or wider.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    _check(q, k, v, beta, log_decay, num_householder, chunk_size)
    batch_size, length, num_heads, head_dim = q.shape
    value_dim, as_rows = v.shape[-1], sequences is None and cu_seqlens is None
    sequences = resolve_sequences("delta_rule", batch_size, length, q.device, sequences, cu_seqlens)
    from_zeros = initial_state is None
    initial_state = resolve_state(
        "delta_rule",
        initial_state,
        (sequences.count, num_heads, head_dim, value_dim),
        q,
        "sequences, heads, key dim, value dim",
    )
    dtype = initial_state.dtype
    scale = head_dim**-0.5 if scale is None else scale
    segment = crossing(sequences)
    per_channel = log_decay is not None and log_decay.ndim == 4
    # fla's product of Householder steps always has a decay per head.
    per_head = num_householder > 1 or (log_decay is not None and not per_channel)
    fits = fla_fits(q, decay_per_head=per_head) and not (per_channel and num_householder > 1)
    fast = "fla" if fits else "chunked"
    if sequences.max_length <= 1 and segment is None:
        fast = "recurrent"
    backend = choose_backend("delta_rule", backend, BACKENDS, "recurrent", fast)
    if segment is not None and backend != "chunked":
        run = partial(
            delta_rule,
            num_householder=num_householder,
            scale=scale,
            backend=backend,
            chunk_size=chunk_size,
        )
        return by_columns(
            run,
            (q, k, v, beta),
            log_decay,
            initial_state,
            sequences,
            segment,
            substeps=num_householder,
        )
    if backend == "fla":
        check_fla("delta_rule", q)
        if per_channel and num_householder > 1:
            raise ValueError(
                "delta_rule: backend 'fla' has no decay per channel with num_householder "
                f"{num_householder}, expected 1"
            )
        return fla_delta_rule(
            q,
            recomputed(Tensor.to, k, q.dtype),
            recomputed(Tensor.to, v, q.dtype),
            beta,
            None if log_decay is None else log_decay.to(dtype),
            num_householder,
            scale,
            initial_state,
            None if as_rows else sequences,
            from_zeros=from_zeros,
        )
    tokens = batch_size * length
    arguments = (
        q.reshape(tokens, num_heads, head_dim).to(dtype) * scale,
        k.reshape(tokens, num_householder, num_heads, head_dim).to(dtype),
        v.reshape(tokens, num_householder, num_heads, value_dim).to(dtype),
        beta.reshape(tokens, num_householder, num_heads).to(dtype),
        None if log_decay is None else log_decay.flatten(0, 1).to(dtype),
        initial_state,
    )
    if backend == "recurrent":
        output, state = recurrent_delta_rule(*arguments, sequences)
    else:
        output, state = chunked_delta_rule(*arguments, sequences, chunk_size)
    return output.to(q.dtype).view(batch_size, length, num_heads, value_dim), state


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    num_householder: int,
    chunk_size: int,
) -> None:
    if num_householder < 1 or chunk_size < num_householder:
        raise ValueError(
            f"delta_rule: num_householder is {num_householder} and chunk_size {chunk_size}, "
            "expected 1 <= num_householder <= chunk_size"
        )
    check_heads("delta_rule", q, v)
    batch_size, length, num_heads, head_dim = q.shape
    steps = (batch_size, num_householder * length, num_heads)
    check_shapes(
        "delta_rule",
        {
            "k": (k, (*steps, head_dim)),
            "v": (v, (*steps, v.shape[-1])),
            "beta": (beta, steps),
            "log_decay": (log_decay, decay_shape(q, log_decay)),
        },
    )
