"""Pieces that several mixers are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.nn.linear import head_shared
from pretrain.nn.mixers.base import Mixer, State, accumulation_dtype, states_wanted
from pretrain.nn.parameters import Initializer, constant, replicated_parameter, sharded_parameter
from pretrain.ops import short_convolution
from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.shared.planning import plans_shared_keys, shared_stand_in
from pretrain.ops.shared.recomputation import recomputed
from pretrain.parallel.context import ParallelContext


@fused
def l2_norm(x: Tensor) -> Tensor:
    """Return ``x / sqrt(sum x^2 + 1e-6)`` over the last axis, in float32 or wider."""
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def conv_init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw uniformly in +-W^-1/2, as torch's Conv1d with one input channel per group."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * shape[-1] ** -0.5


def decay_rate_init(low: float = 0.0, high: float = 16.0) -> Initializer:
    """Return an initialiser of A_log with A uniform in (low, high)."""
    return DecayRate(low, high)


@dataclass(frozen=True)
class DecayRate:
    """Draw A_log with A uniform in (low, high); a class, so that models can be pickled."""

    low: float
    high: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return float32 values of ``shape``."""
        rate = torch.rand(shape, generator=generator) * (self.high - self.low) + self.low
        return rate.clamp_min(1e-4).log()


def time_step_init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw dt_bias such that softplus(dt_bias) is log-uniform in [1e-3, 1e-1]."""
    low, high = math.log(1e-3), math.log(1e-1)
    dt = (torch.rand(shape, generator=generator) * (high - low) + low).exp().clamp_min(1e-4)
    return dt + torch.log(-torch.expm1(-dt))


def gate_parameter(
    parallel: ParallelContext, shape: tuple[int, ...], init: Initializer
) -> torch.nn.Parameter:
    """Return a sharded parameter in float32 or wider without weight decay, as gates need it."""
    dtype = accumulation_dtype(parallel.dtype)
    return sharded_parameter(parallel, shape, init, dtype=dtype, decay=False)


@fused
def softplus_decay(x: Tensor, rate_log: Tensor, bias: Tensor) -> Tensor:
    """Return ``-exp(A_log) softplus(x + dt_bias)``, a log-decay, in the gates' dtype."""
    return -rate_log.exp() * F.softplus(x.to(bias.dtype) + bias)


@fused
def forget_gate(x: Tensor, rate_log: Tensor, bias: Tensor) -> Tensor:
    """Return ``exp(-exp(A_log) softplus(x + dt_bias))``, a decay, in the gates' dtype."""
    return (-rate_log.exp() * F.softplus(x.to(bias.dtype) + bias)).exp()


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Repeat every head of ``[B, T, H, dim]``, consecutively, for the heads that share it."""
    if x.shape[2] == 1 and plans_shared_keys(x):
        return shared_stand_in(x, times)
    found: Tensor = recomputed(Tensor.repeat_interleave, x, times, 2)
    return found


def add_short_convolutions(
    mixer: Mixer,
    parallel: ParallelContext,
    widths: dict[str, int],
    size: int,
    *,
    bias: bool = False,
    shared: str = "",
) -> None:
    """Give ``mixer`` a parameter ``NAME_conv`` (and ``NAME_conv_bias``) for each of ``widths``.

    ``widths`` are this process's, by names of one letter; a ``size`` of 0 means no convolution.
    Those named in ``shared`` are replicated, for heads that all processes use.
    """
    for name, width in widths.items():
        if size:
            make = replicated_parameter if name in shared else sharded_parameter
            weight = make(parallel, (width, size), conv_init, decay=False)
            mixer.register_parameter(f"{name}_conv", weight)
            if bias:
                zeros = make(parallel, (width,), constant(0.0), decay=False)
                mixer.register_parameter(f"{name}_conv_bias", zeros)


def _conv_parameter(mixer: Mixer, key: str) -> Tensor | None:
    parameter: Tensor | None = getattr(mixer, key, None)
    if parameter is None or getattr(parameter, "tensor_model_parallel", False):
        return parameter
    return head_shared(parameter, mixer.parallel)


def convolve(
    mixer: Mixer,
    name: str,
    x: Tensor,
    sequences: Sequences | None,
    state: State | None,
    new_state: State,
    *,
    activation: str | None = "silu",
) -> Tensor:
    """Return the convolution NAME_conv over x ``[T, B, D]``, batch-first ``[B, T, D]``.

    ``activation`` is what it goes through, SiLU or None; also where there is no convolution.
    """
    x, key = x.transpose(0, 1), f"{name}_conv"
    weight = _conv_parameter(mixer, key)
    if weight is not None:
        x, last_inputs = short_convolution(
            x,
            weight,
            _conv_parameter(mixer, f"{key}_bias"),
            activation=activation,
            sequences=sequences,
            initial_state=None if state is None else state[key],
            final_state=states_wanted(),
        )
        if last_inputs is not None:
            new_state[key] = last_inputs
        return x
    return x if activation is None else recomputed(F.silu, x)


def convolution_states(
    mixer: Mixer, parallel: ParallelContext, batch_size: int, names: str | list[str]
) -> State:
    """Return the empty histories of the convolutions."""
    found = {}
    for name in names:
        weight = getattr(mixer, f"{name}_conv", None)
        if weight is not None:
            # Of a parameter that ZeRO-3 has sharded DeepSpeed keeps the shape.
            channels, width = getattr(weight, "ds_shape", weight.shape)
            found[f"{name}_conv"] = torch.zeros(
                batch_size, width - 1, channels, dtype=parallel.dtype, device=parallel.device
            )
    return found


def borders(sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sequences that have tokens, and their first and last tokens."""
    lengths = torch.tensor(sequences.lengths, dtype=torch.int64)
    ends = lengths.cumsum(0)
    owners = lengths.nonzero()[:, 0]
    found = owners, (ends - lengths)[owners], ends[owners] - 1
    device = sequences.device
    return found[0].to(device), found[1].to(device), found[2].to(device)


def matrix_state(parallel: ParallelContext, *shape: int) -> Tensor:
    """Return zeros in the dtype that recurrent states are kept in."""
    return torch.zeros(shape, dtype=accumulation_dtype(parallel.dtype), device=parallel.device)


def delta_rule_flops(
    key_dim: int, value_dim: int, chunk_size: int, substeps: int = 1, *, per_channel: bool = False
) -> int:
    """Return the matrix-multiply FLOPs of the chunked delta rule for one token and head."""
    k, v, n = key_dim, value_dim, substeps
    c = chunk_size // n * n
    if per_channel:
        return 2 * (c - 1) * k + 2 * c * (k + 2 * v) + 6 * k * v
    return n * (2 * c * (2 * k + v) + 4 * k * v) + 2 * c * (k + v) + 2 * k * v


def dplr_flops(key_dim: int, value_dim: int, chunk_size: int, *, per_channel: bool) -> int:
    """Return the matrix-multiply FLOPs of chunked diagonal plus low rank for one token and head."""
    k, v, c = key_dim, value_dim, chunk_size
    pairs = 4 * (c - 1) * k if per_channel else 8 * c * k
    return pairs + 2 * c * (k + 4 * v) + 8 * k * v


def linear_attention_flops(
    key_dim: int, value_dim: int, chunk_size: int, *, per_channel: bool = False
) -> int:
    """Return the matrix-multiply FLOPs of chunked linear attention for one token and head."""
    pairs = (chunk_size - 1) * key_dim if per_channel else 2 * chunk_size * key_dim
    return pairs + 2 * chunk_size * value_dim + 4 * key_dim * value_dim


def power_of_two(chunk_size: int) -> None:
    """Raise ValueError unless the chunk is a power of two, which decays per channel need."""
    if chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size is {chunk_size}, expected a power of two")
