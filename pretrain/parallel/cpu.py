"""What megatron-core needs to run on a machine without CUDA; a no-op where CUDA is present.

megatron-core 0.16-0.19 runs its tensor-parallel layers on the CPU as it is; its schedules, data
parallel and optimizer name the device "cuda" literally. Two adaptations: some of ``torch.cuda``
answers for the CPU, and, only while :func:`device_scope` is active, ``device="cuda"`` means the CPU
and ``Tensor.type()`` answers ``torch.cuda.*``, which the optimizer tests for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def install() -> None:
    """Adapt ``torch.cuda`` when there is no CUDA; harmless when called twice."""
    if torch.cuda.is_available():
        return
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda device=None: None
    cuda.current_stream = lambda device=None: torch.cpu.current_stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    # What moves the number of each expert's tokens to the host, on a stream of its own.
    with _without_compiler():
        from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = _HostStream()


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """megatron-core compiles its fused functions where they are defined, and to name
    ``torch.compile`` imports the compiler: a third of a process's start, for nothing on a CPU."""
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda found: found)  # type: ignore
    try:
        yield
    finally:
        torch.compile = compiler


class _HostStream:
    """A stream, and an event on it, where there is nothing to wait for."""

    def wait_stream(self, _: Any) -> None:
        pass

    def record_event(self) -> _HostStream:
        return self

    def synchronize(self) -> None:
        pass


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(args[0]).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return function(*args, **kwargs)


def device_scope() -> contextlib.AbstractContextManager[Any]:
    """Around every call into megatron-core's schedules, data parallel and optimizer."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()


def model_scope() -> contextlib.AbstractContextManager[Any]:
    """Around our own model's forward inside a schedule: the scope above is costly per operation."""
    return (
        contextlib.nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction()
    )
