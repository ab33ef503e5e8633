"""Fused chunked kernels of the package flash-linear-attention (fla) on CUDA, backend ``fla``.

They serve linear attention, the delta rules, the mesa layer, the short convolution and, where asked
for, the diagonal scan; they take bfloat16 or float16 and keep the state in float32. They are
checked against our definitions where a GPU is (benchmarks/ops_gpu.py) and, on a CPU in Triton's
interpreter, in tests/pretrain/ops/test_fla.py.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.fla_work import (
    planned_delta_rule,
    planned_linear_attention,
    planned_mesa,
    planned_short_convolution,
)
from pretrain.ops.shared.planning import device_type

_WIDEST = 256  # channels of a key


def fla_fits(q: Tensor, *, decay_per_head: bool = False) -> bool:
    """Return whether ``auto`` may take fla for queries ``[..., K]``.

    ``decay_per_head``: whether the op is given a decay of one number for each token and head.
    """
    return (
        device_type(q) == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] <= _WIDEST
        # Plans are made for machines that have it.
        and (q.is_meta or _usable(q.device, decay_per_head=decay_per_head))
    )


@functools.cache
def _found() -> bool:
    return importlib.util.find_spec("fla") is not None


@functools.cache
def _usable(device: torch.device, *, decay_per_head: bool) -> bool:
    """Return whether a tested version of fla is installed, with a Triton that compiles it right.

    Before 3.7.1 Triton compiles the backward pass of decays per head wrong for Hopper, and fla
    refuses it (fla-org/flash-linear-attention issue 640). Such a decay then goes another way in
    forward passes without gradients too: what is recomputed must be what was computed.
    """
    if not _found() or not _at_least("flash-linear-attention", (0, 6)):
        return False
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    return _at_least("triton", (3, 7, 1) if hopper and decay_per_head else (3, 6))


def _at_least(package: str, version: tuple[int, ...]) -> bool:
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, re.findall(r"\d+", found)[:3])) >= version


def check_fla(op: str, q: Tensor) -> None:
    """Raise ValueError where fla is not installed or does not take ``q``."""
    if not (_found() or q.is_meta):
        raise ValueError(
            f"{op}: backend 'fla' needs flash-linear-attention, which is not installed"
        )
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{op}: backend 'fla' takes bfloat16 or float16, found {q.dtype}")
    if q.shape[-1] > _WIDEST:
        raise ValueError(
            f"{op}: backend 'fla' takes keys of at most {_WIDEST} channels, found {q.shape[-1]}"
        )


def fla_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    num_householder: int,
    scale: float,
    initial_state: Tensor,
    sequences: Sequences | None,
    *,
    from_zeros: bool,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`pretrain.ops.delta_rule`; log_decay in float32.

    More than one Householder step cannot be combined with a decay per channel.
    """
    beta = beta.to(q.dtype)
    if q.is_meta:
        return planned_delta_rule(q, k, v, beta, log_decay, initial_state, sequences, from_zeros)
    # Zeros would be kept for the backward pass, and take a gradient.
    given = None if from_zeros else initial_state
    options = fla_options(scale, given, sequences)
    if num_householder > 1:
        from fla.ops.gated_delta_product import chunk_gated_delta_product

        # Always with a decay: it has the gate's gradient in mind, and decays of 0 are none.
        decay = q.new_zeros(q.shape[:3], dtype=torch.float32) if log_decay is None else log_decay
        return chunk_gated_delta_product(q, k, v, decay, beta, num_householder, **options)
    if log_decay is None:
        from fla.ops.delta_rule import chunk_delta_rule

        return chunk_delta_rule(q, k, v, beta, **options)
    if log_decay.ndim == 3:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule(q, k, v, log_decay, beta, **options)
    from fla.ops.kda import chunk_kda

    return chunk_kda(q, k, v, log_decay, beta, **options)


def fla_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor,
    sequences: Sequences | None,
    *,
    from_zeros: bool,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`pretrain.ops.linear_attention`; log_decay in float32.

    ``from_zeros``: whether the initial state is 0.
    """
    if q.is_meta:
        return planned_linear_attention(q, k, v, log_decay, initial_state, sequences, from_zeros)
    # Zeros would be kept for the backward pass, and take a gradient.
    given = None if from_zeros else initial_state
    options = fla_options(scale, given, sequences)
    if log_decay is not None and log_decay.ndim == 4:
        from fla.ops.gla import chunk_gla

        return chunk_gla(q, k, v, log_decay, **options)
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, log_decay, **options)


def fla_mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    ridge: Tensor,
    log_decay: Tensor,
    iterations: int,
    initial_state: tuple[Tensor, Tensor],
    sequences: Sequences | None,
    *,
    from_zeros: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute :func:`pretrain.ops.mesa`; beta, ridge and log_decay in float32, V equal to K.

    Its queries and keys are in float16, and 1e-5 is added to what an iteration divides by.
    """
    if q.is_meta:
        return planned_mesa(
            q, k, v, beta, ridge, log_decay, iterations, initial_state, sequences, from_zeros
        )
    from fla.ops.mesa_net import chunk_mesa_net

    covariance, state = (None, None) if from_zeros else initial_state
    output, *last = chunk_mesa_net(
        q,
        k,
        v,
        log_decay,
        beta,
        ridge,
        h_kk_init=covariance,
        h_kv_init=state,
        output_final_state=True,
        max_CG_iteration=iterations,
        **({} if sequences is None else sequences.derive(_packed)),
    )
    return output, (last[0], last[1])


def fla_options(
    scale: float, initial_state: Tensor | None, sequences: Sequences | None
) -> dict[str, Any]:
    """Return the keyword arguments that fla's recurrences share."""
    found: dict[str, Any] = {
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": True,
    }
    return found if sequences is None else found | sequences.derive(_packed)


def _packed(sequences: Sequences) -> dict[str, Tensor]:
    """Return fla's arguments for packed sequences.

    Made once, for fla itself caches what it derives by the tensor; the lengths come from the host,
    so that nothing waits for the device.
    """
    return {"cu_seqlens": sequences.cu_seqlens.long(), "cu_seqlens_cpu": sequences.on_host}


def check_fla_scan(op: str, log_decay: Tensor | None, x: Tensor) -> None:
    """Raise ValueError where fla is not installed or does not take the decay, or ``x``."""
    if not _found():
        raise ValueError(
            f"{op}: backend 'fla' needs flash-linear-attention, which is not installed"
        )
    if log_decay is None:
        raise ValueError(f"{op}: backend 'fla' takes log_decay, found a")
    if x.dtype != torch.float32:
        raise ValueError(f"{op}: backend 'fla' computes in float32, which {x.dtype} is not")


def fla_diagonal_scan(
    log_decay: Tensor, x: Tensor, initial_state: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Compute :func:`pretrain.ops.diagonal_scan` of ``[T, D]`` in float32, step after step.

    Of fla's two kernels, the one over chunks knows no documents and no gradient of the last state.
    """
    from fla.ops.hgrn import fused_recurrent_hgrn

    cu_seqlens = sequences.derive(_packed)["cu_seqlens"]
    output, state = fused_recurrent_hgrn(
        x[None], log_decay[None], initial_state, True, cu_seqlens=cu_seqlens
    )
    return output[0], state


def fla_short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    sequences: Sequences | None,
) -> Tensor:
    """Compute y of :func:`pretrain.ops.short_convolution`; initial_state ``[N, W - 1, D]``."""
    if x.is_meta:
        return planned_short_convolution(x, weight, bias)
    from fla.modules.causal_conv1d import causal_conv1d

    options = {} if sequences is None else dict(sequences.derive(_packed))
    if initial_state is not None:  # theirs is [N, D, W], of which the first is never read
        options["initial_state"] = torch.nn.functional.pad(initial_state.mT, (1, 0))
    y, _ = causal_conv1d(
        x,
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        activation=activation,
        backend="triton",
        **options,
    )
    return y
