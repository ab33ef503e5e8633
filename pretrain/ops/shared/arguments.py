"""Checks and defaults shared by the recurrences."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences, check_fits, given_sequences
from pretrain.ops.shared.planning import device_type

# In an exported model's source it is not.
_IN_A_FILE = "__file__" in globals()
_definitions_only: ContextVar[bool] = ContextVar("_definitions_only", default=False)


@contextmanager
def definitions() -> Iterator[None]:
    """Make ``backend="auto"`` mean each op's definition while open.

    Definitions are slow and plain, and what every faster form is tested against: this finds out
    whether a fast form is to blame.
    """
    token = _definitions_only.set(True)
    try:
        yield
    finally:
        _definitions_only.reset(token)


def choose_backend(op: str, backend: str, known: Sequence[str], definition: str, fast: str) -> str:
    """Return what ``backend`` stands for.

    ``auto`` is ``fast``, or ``definition`` within :func:`definitions`. Raises ValueError for a
    backend that ``op`` does not have.
    """
    if backend not in known:
        raise ValueError(f"{op}: backend is '{backend}', expected one of {tuple(known)}")
    if backend != "auto":
        return backend
    return definition if _definitions_only.get() else fast


def triton_fits(x: Tensor, shared_memory: int = 0) -> bool:
    """Return whether ``auto`` may take a Triton kernel for ``x``.

    It may on CUDA, in float32 or lower precision, where a program may have so many bytes of shared
    memory. On the meta device kernels allocate what they would, and compute nothing.
    """
    if device_type(x) != "cuda" or x.dtype == torch.float64 or not _has_triton():
        return False
    return x.is_meta or _shared_memory(x.device) >= shared_memory


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Return the bytes that a program may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def check_triton(op: str, x: Tensor) -> None:
    """Raise ValueError where no kernel can run on ``x``."""
    if not _has_triton():
        raise ValueError(f"{op}: backend 'triton' needs the package triton: pip install triton")
    from pretrain.ops.shared.launching import interpreted

    if not (x.is_cuda or x.is_meta or interpreted()):
        raise ValueError(
            f"{op}: backend 'triton' needs CUDA tensors, found one on '{x.device.type}'; "
            "TRITON_INTERPRET=1 runs it there, slowly"
        )


def numba_fits(x: Tensor) -> bool:
    """Return whether ``auto`` may take loops compiled by numba for ``x``: on a CPU, with values.

    In an exported model it may not: code that lies in no file is compiled anew by every process.
    """
    plain = type(x) in (Tensor, torch.nn.Parameter)
    return plain and x.device.type == "cpu" and _IN_A_FILE and has_numba()


@functools.cache
def has_numba() -> bool:
    """Return whether numba is installed, which compiles loops for CPUs."""
    return importlib.util.find_spec("numba") is not None


def check_numba(op: str, x: Tensor) -> None:
    """Raise ValueError where no loop compiled by numba can run on ``x``."""
    if not has_numba():
        raise ValueError(f"{op}: backend 'compiled' needs the package numba: pip install numba")
    if x.device.type != "cpu":
        raise ValueError(
            f"{op}: backend 'compiled' needs tensors on the CPU, found one on '{x.device.type}'"
        )


def check_shapes(op: str, expected: Mapping[str, tuple[Tensor | None, Sequence[int]]]) -> None:
    """Raise ValueError naming the first tensor that has not its expected shape."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, expected {tuple(shape)}")


def check_heads(op: str, q: Tensor, v: Tensor, name: str = "q") -> None:
    """Raise ValueError unless q (or ``name``) and v have the four axes ``[B, T, H, dim]``."""
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"{op}: {name} is {tuple(q.shape)} and v {tuple(v.shape)}, expected [B, T, H, dim]"
        )


def decay_shape(q: Tensor, log_decay: Tensor | None) -> tuple[int, ...]:
    """Return the expected shape of log_decay: ``[B, T, H]``, or with four axes ``[B, T, H, K]``."""
    per_channel = log_decay is not None and log_decay.ndim == 4
    return tuple(q.shape if per_channel else q.shape[:3])


def resolve_sequences(
    op: str,
    batch_size: int,
    length: int,
    device: torch.device,
    sequences: Sequences | Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> Sequences:
    """Return the sequences that a caller named by either keyword, the rows where by neither.

    Raises ValueError where both are given, and where they do not fit the ``batch_size`` rows of
    ``length`` tokens.
    """
    given = given_sequences(op, sequences, cu_seqlens)
    if given is None:
        return Sequences.of_rows(batch_size, length, device)
    check_fits(op, given, batch_size, length)
    return given


def resolve_state(
    op: str, initial_state: Tensor | None, shape: tuple[int, ...], like: Tensor, axes: str
) -> Tensor:
    """Return the state to start from, zeros by default, in float32 or wider.

    ``axes`` names the axes of ``shape``. Raises ValueError for another shape.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if initial_state is None:
        return like.new_zeros(shape, dtype=dtype)
    if tuple(initial_state.shape) != shape:
        raise ValueError(
            f"{op}: initial_state is {tuple(initial_state.shape)}, expected {shape} ({axes})"
        )
    return initial_state.to(dtype)


def sequence_rows(sequences: Sequences) -> list[range]:
    """Return the token indices of each sequence."""
    ends = itertools.accumulate(sequences.lengths, initial=0)
    return [range(a, b) for a, b in itertools.pairwise(ends)]
