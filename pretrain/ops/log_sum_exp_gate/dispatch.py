"""The log-sum-exp gate: what makes a recurrence a softmax over the past.

    z_t = log(e^{z_{t-1}} + e^{x_t});  weight_t = e^{x_t - z_t};  decay_t = e^{z_{t-1} - z_t}

``S_t = decay_t S_{t-1} + weight_t v_t`` is then the mean of all v_s so far, weighted by e^{x_s}.
Sources: LightNet arXiv 2405.21022, Aaren arXiv 2405.13956.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.across import crossing
from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.log_sum_exp_gate.chunked import chunked_log_sum_exp
from pretrain.ops.log_sum_exp_gate.definition import recurrent_log_sum_exp
from pretrain.ops.over_heads import Ends, over_heads
from pretrain.ops.shared.arguments import choose_backend, resolve_sequences, resolve_state
from pretrain.ops.shared.autocast import without_autocast
from pretrain.ops.shared.recomputation import recomputed

BACKENDS = ("auto", "recurrent", "chunked")


@without_autocast
def log_sum_exp_gate(
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the weights and decays of a softmax over all tokens so far, per channel.

    x: logits ``[B, T, H, K]``. With ``sequences`` (or their tensor ``cu_seqlens`` ``[N + 1]``) B
    must be 1 and N sequences are packed along T. ``initial_state``: z before the first tokens,
    ``[N, H, K]``, or ``[B, H, K]``; -inf, the default, where nothing came before.

    backend: ``recurrent`` is the definition, a plain loop; ``chunked`` (and ``auto``) sums over
    chunks of ``chunk_size`` tokens.

    Returns the weights ``[B, T, H, K]`` in x's dtype, their log-decays in float32 or wider, and the
    last z. Neither is found as a difference of two z, which after many tokens is less than their
    rounding. Where nothing came before, the weight is 1 and the log-decay 0.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    backend = choose_backend("log_sum_exp_gate", backend, BACKENDS, "recurrent", "chunked")
    if x.ndim != 4:
        raise ValueError(f"log_sum_exp_gate: x is {tuple(x.shape)}, expected [B, T, H, K]")
    if chunk_size < 1:
        raise ValueError(f"log_sum_exp_gate: chunk_size is {chunk_size}, expected at least 1")
    batch_size, length, num_heads, dim = x.shape
    sequences = resolve_sequences(
        "log_sum_exp_gate", batch_size, length, x.device, sequences, cu_seqlens
    )
    shape, dtype = (sequences.count, num_heads, dim), torch.promote_types(x.dtype, torch.float32)
    if initial_state is None:
        initial_state = x.new_full(shape, -torch.inf, dtype=dtype)
    initial_state = resolve_state(
        "log_sum_exp_gate", initial_state, shape, x, "sequences, heads, key dim"
    )

    def differences(
        tensors: Sequence[Tensor], begun: Sequence[Tensor], row: Sequences, heads: slice
    ) -> tuple[Tensor, Ends]:
        logits = tensors[0].to(dtype)
        flat, z = logits.flatten(0, 1), begun[0]
        if backend == "recurrent":
            found, last = recurrent_log_sum_exp(flat, z, row)
        else:
            found, last = recomputed(chunked_log_sum_exp, flat, z, row, chunk_size)
        return found.view(logits.shape), [(last, [1] * row.count)]

    if crossing(sequences) is None:
        found, ends = differences([x], [initial_state], sequences, slice(None))
        last = ends[0][0]
    else:
        found, (last,) = over_heads(sequences, differences, [x], num_heads, [initial_state])
    weight, log_decay = _gate(found, x.dtype)
    return weight, log_decay, last


@fused
def _gate(difference: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weight and log-decay: ``z_t = z_{t-1} + softplus(x_t - z_{t-1})``."""
    log_decay = F.logsigmoid(-difference).masked_fill(difference == torch.inf, 0.0)
    return torch.sigmoid(difference).to(dtype), log_decay
