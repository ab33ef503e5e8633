"""Memories trained online (Miras, arXiv 2504.13173): Moneta, Yaad, Memora.

    A_t = a_t A_{t-1} - r_t grad loss(M(W; k_t) - v_t);   W_t = retention(A_t);   o_t = M(W_t; q_t)

M is a matrix, M(W; x) = x W, or an MLP of two, x + LN(gelu(x W_1) W_2). The loss is
``sum e^2`` (l2), ``sum |e|^p`` (lp) or Huber's with a threshold d, ``e^2 / 2`` up to |e| = d and
``d |e| - d^2 / 2`` beyond. The retention is ``A / ||A||_q^(q - 2)`` (norm), ``sign(A) |A|^(q - 1) /
||A||_q^(q - 2)`` (mirror), or the softmax of A over a matrix's inputs, whose A is the logarithm of
W_{t-1} when it decays. Decays a_t and rates r_t are for each channel of the model's side of a
matrix: the inputs of W and W_1, the outputs of W_2.

Chunks of C tokens are part of what is computed: all gradients of a chunk are taken at the W that
its first token found, and the norm, and the logarithm of W, are taken anew by its last token. With
C = 1 this is the rule above. Chunks are counted from the first token of each document.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.across import crossing
from pretrain.ops.miras.chunked import chunked_miras
from pretrain.ops.miras.definition import recurrent_miras
from pretrain.ops.miras.rule import MirasRule, MirasState
from pretrain.ops.shared.arguments import (
    check_heads,
    check_shapes,
    choose_backend,
    decay_shape,
    resolve_sequences,
)
from pretrain.ops.shared.autocast import without_autocast

BACKENDS = ("auto", "recurrent", "chunked")
LOSSES, RETENTIONS = ("l2", "lp", "huber"), ("norm", "mirror", "softmax")


@without_autocast
def miras(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    rate: Tensor,
    memory: Sequence[Tensor],
    *,
    rule: MirasRule,
    threshold: Tensor | None = None,
    chunk_size: int = 16,
    initial_state: MirasState | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MirasState]:
    """Train a memory on keys and values, and read it by queries.

    q, k: ``[B, T, H, K]``; v: ``[B, T, H, V]``; log_decay, at most 0, and rate: ``[B, T, H]`` or
    ``[B, T, H, K]``; threshold: that of the Huber loss, ``[B, T, H, V]``. ``memory``: A as every
    document finds it, one matrix ``[H, K, V]``, or two of an MLP, ``[H, K, M]`` and ``[H, M, K]``
    with V = K. With ``sequences`` (or their tensor ``cu_seqlens`` ``[N + 1]``) B must be 1 and N
    sequences are packed along T.

    backend: ``recurrent`` is the definition, which differentiates the loss token by token;
    ``chunked`` (and ``auto``) goes from chunk to chunk.

    Returns the output ``[B, T, H, V]`` in q's dtype and the state, float32 or wider. Raises
    ValueError for shapes that do not fit, for a rule without meaning, for an unknown backend, and
    for a row that is divided over ranks.
    """
    backend = choose_backend("miras", backend, BACKENDS, "recurrent", "chunked")
    check_heads("miras", q, v)
    _check_rule(rule, threshold, chunk_size)
    batch_size, length, num_heads, key_dim = q.shape
    value_dim = v.shape[-1]
    check_shapes(
        "miras",
        {
            "k": (k, q.shape),
            "v": (v, (*q.shape[:3], value_dim)),
            "log_decay": (log_decay, decay_shape(q, log_decay)),
            "rate": (rate, decay_shape(q, rate)),
            "threshold": (threshold, v.shape),
            **_memory_shapes(memory, num_heads, key_dim, value_dim),
        },
    )
    sequences = resolve_sequences("miras", batch_size, length, q.device, sequences, cu_seqlens)
    if crossing(sequences) is not None:
        raise ValueError(
            "miras: the sequences are a segment of a row that is divided over ranks, expected "
            "whole sequences, or pieces of them with the state that they continue from"
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    base = [rule.kept(matrix.to(dtype)) for matrix in memory]
    state = _resolve_state(initial_state, base, sequences)
    log_decay, rate = (
        (x if x.ndim == 4 else x[..., None].expand(q.shape)) for x in (log_decay, rate)
    )
    q_wide, k, v, log_decay, rate = (x.flatten(0, 1).to(dtype) for x in (q, k, v, log_decay, rate))
    threshold = None if threshold is None else threshold.flatten(0, 1).to(dtype)
    starts = tuple(b + a for b, a in zip(base, state.start, strict=True))
    nows = tuple(b + a for b, a in zip(base, state.now, strict=True))
    tokens = (q_wide, k, v, log_decay, rate)
    shared = (threshold, starts, nows)
    if backend == "recurrent":
        output, starts, nows = recurrent_miras(
            tokens, *shared, state.seen, rule, sequences, chunk_size
        )
    else:
        seen = None if initial_state is None else state.seen
        output, starts, nows = chunked_miras(tokens, *shared, seen, rule, sequences, chunk_size)
    new = MirasState(
        tuple(a - b for b, a in zip(base, starts, strict=True)),
        tuple(a - b for b, a in zip(base, nows, strict=True)),
        state.seen + sequences.sizes,
    )
    return output.to(q.dtype).view(batch_size, length, num_heads, value_dim), new


def _check_rule(rule: MirasRule, threshold: Tensor | None, chunk_size: int) -> None:
    if rule.loss not in LOSSES:
        raise ValueError(f"miras: loss is '{rule.loss}', expected one of {LOSSES}")
    if rule.retention not in RETENTIONS:
        raise ValueError(f"miras: retention is '{rule.retention}', expected one of {RETENTIONS}")
    if rule.p < 1 or rule.norm < 2:
        raise ValueError(
            f"miras: p is {rule.p} and norm {rule.norm}, expected at least 1 and at least 2"
        )
    if chunk_size < 1:
        raise ValueError(f"miras: chunk_size is {chunk_size}, expected at least 1")
    if (rule.loss == "huber") != (threshold is not None):
        raise ValueError(
            f"miras: threshold is {'missing' if threshold is None else 'given'} with the loss "
            f"'{rule.loss}', expected one for 'huber' alone"
        )


def _memory_shapes(
    memory: Sequence[Tensor], num_heads: int, key_dim: int, value_dim: int
) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Return the memory's matrices with the shapes that they should have."""
    if len(memory) == 1:
        return {"memory[0]": (memory[0], (num_heads, key_dim, value_dim))}
    if len(memory) != 2:
        raise ValueError(f"miras: memory has {len(memory)} matrices, expected 1 or 2")
    if key_dim != value_dim:
        raise ValueError(
            f"miras: keys have {key_dim} channels and values {value_dim}, expected as many for a "
            "memory of two matrices"
        )
    hidden = memory[0].shape[-1]
    return {
        "memory[0]": (memory[0], (num_heads, key_dim, hidden)),
        "memory[1]": (memory[1], (num_heads, hidden, key_dim)),
    }


def _resolve_state(
    state: MirasState | None, base: Sequence[Tensor], sequences: Sequences
) -> MirasState:
    """Return the state to start from, zeros by default, in the dtype of ``base``."""
    count = sequences.count
    if state is None:
        zeros = tuple(b.new_zeros(count, *b.shape) for b in base)
        seen = torch.zeros(count, dtype=torch.int64, device=sequences.device)
        return MirasState(zeros, zeros, seen)
    if len(state.start) != len(base) or len(state.now) != len(base):
        raise ValueError(
            f"miras: initial_state has {len(state.start)} and {len(state.now)} matrices, expected "
            f"{len(base)} of both"
        )
    expected: dict[str, tuple[Tensor | None, Sequence[int]]] = {
        f"initial_state.{name}[{i}]": (a, (count, *base[i].shape))
        for name in ("start", "now")
        for i, a in enumerate(getattr(state, name))
    }
    check_shapes("miras", {**expected, "initial_state.seen": (state.seen, (count,))})
    dtype = base[0].dtype
    return MirasState(
        tuple(a.to(dtype) for a in state.start),
        tuple(a.to(dtype) for a in state.now),
        state.seen,
    )
