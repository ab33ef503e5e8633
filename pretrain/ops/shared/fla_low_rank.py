"""flash-linear-attention's kernels whose transition is diagonal plus low rank, on CUDA.

They take bfloat16 or float16 and keep the state in float32, as those of
:mod:`pretrain.ops.shared.flash_linear_attention` do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.fla_work import planned_low_rank
from pretrain.ops.shared.flash_linear_attention import fla_options

# q, k, v and two more
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def fla_dplr(
    tensors: Tensors,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor,
    sequences: Sequences | None,
    *,
    from_zeros: bool,
    lower_bound: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`pretrain.ops.dplr` of (q, k, v, erase, write); log_decay in float32."""
    q = tensors[0]
    if log_decay is None:
        log_decay = q.new_zeros(q.shape, dtype=torch.float32)
    elif log_decay.ndim == 3:
        log_decay = log_decay[..., None].expand(q.shape)
    if q.is_meta:
        return planned_low_rank("dplr", tensors, log_decay, initial_state, sequences, from_zeros)
    from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule

    # Zeros would be kept for the backward pass, and take a gradient.
    options = fla_options(scale, None if from_zeros else initial_state, sequences)
    return chunk_dplr_delta_rule(*tensors, log_decay, lower_bound=lower_bound, **options)


def fla_gdn2(
    tensors: Tensors,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    sequences: Sequences | None,
    *,
    from_zeros: bool,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`pretrain.ops.gdn2` of (q, k, v, erase gate, write gate)."""
    q, k, v, erase_gate, write_gate = tensors
    if q.is_meta:
        return planned_low_rank("gdn2", tensors, log_decay, initial_state, sequences, from_zeros)
    from fla.ops.gdn2 import chunk_gdn2

    options = fla_options(scale, None if from_zeros else initial_state, sequences)
    return chunk_gdn2(q, k, v, log_decay, erase_gate, write_gate, **options)


def fla_comba(
    tensors: Tensors,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    sequences: Sequences | None,
    *,
    from_zeros: bool,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`pretrain.ops.comba` of (q, k, v, erase, beta)."""
    q, k, v, erase, beta = tensors
    if q.is_meta:
        return planned_low_rank("comba", tensors, log_decay, initial_state, sequences, from_zeros)
    from fla.ops.comba import chunk_comba

    options = fla_options(scale, None if from_zeros else initial_state, sequences)
    return chunk_comba(q, k, v, erase, log_decay, beta, **options)
