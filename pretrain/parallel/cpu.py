"""Stand-ins that megatron-core needs on a machine without CUDA; no-ops where CUDA is present.

megatron-core 0.16-0.19 names the device "cuda" literally in its schedules, data parallel and
optimizer. While :func:`device_scope` is active, and only then, ``device="cuda"`` means the CPU,
``Tensor.type()`` answers ``torch.cuda.*``, which the optimizer tests for, and some of
``torch.cuda`` answers for the CPU.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pretrain.common.deferred_imports import deferred_imports
from pretrain.common.garbage import paused_collection

_NOT_ON_A_CPU = ("triton", "torch.utils.tensorboard")
# What megatron-core imports for its own inference, checkpoints and fully sharded data parallel,
# torch's distributed tensors, and a compiler for NCCL: a third of its time. Each with the module
# that defines its classes.
_USED_BY_NO_LAYOUT = {
    **{
        name: name
        for name in (
            "megatron.core.distributed.fsdp.mcore_fsdp_adapter",
            "megatron.core.distributed.torch_fully_sharded_data_parallel",
            "megatron.core.inference.contexts",
            "megatron.core.transformer.fsdp_dtensor_checkpoint",
            "torch.utils.cpp_extension",
        )
    },
    "megatron.core.inference_params": "megatron.core.inference.contexts",
    "torch.distributed._tensor": "torch.distributed.tensor",
    "torch.distributed.tensor.placement_types": "torch.distributed.tensor",
}


@contextlib.contextmanager
def uncompiled_functions() -> Iterator[None]:
    """Leave functions as they are that are defined with ``torch.compile`` in this scope.

    To name it imports the compiler, which takes longer than what it is named for.
    """
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda found: found)  # type: ignore
    try:
        yield
    finally:
        torch.compile = compiler


@contextlib.contextmanager
def importing_megatron() -> Iterator[None]:
    """Import megatron-core without what it needs on a GPU alone, or not for us.

    megatron-core compiles its fused functions where they are defined, and to name
    ``torch.compile`` imports the compiler: half of a process's start, for nothing on a CPU. So are
    Triton and TensorBoard, which it imports where it finds them. Other libraries and parts of its
    own are imported when something of them is used. What it warns of then, that libraries for GPUs
    are missing, helps nobody.
    """
    with paused_collection(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            yield
            return
        hidden = [name for name in _NOT_ON_A_CPU if name not in sys.modules]
        modules: dict[str, Any] = dict.fromkeys(hidden)  # None: "no such module"
        sys.modules.update(modules)
        try:
            with uncompiled_functions(), deferred_imports(["megatron"], _USED_BY_NO_LAYOUT):
                yield
        finally:
            for name in hidden:
                del sys.modules[name]


class _CudaMeansCpu(TorchFunctionMode):
    """The mode in which "cuda" means the CPU; it can be entered several times at once."""

    _depth = 0
    _kept: dict[str, Any] = {}  # noqa: RUF012

    def __enter__(self) -> Any:
        kind = type(self)
        if kind._depth == 0:
            answers: dict[str, Any] = {
                "current_device": lambda: torch.device("cpu"),
                "synchronize": lambda device=None: None,
                "current_stream": lambda device=None: torch.cpu.current_stream(),
                "stream": lambda stream: contextlib.nullcontext(),
            }
            kind._kept = {name: getattr(torch.cuda, name) for name in answers}
            for name, answer in answers.items():
                setattr(torch.cuda, name, answer)
        kind._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        kind = type(self)
        kind._depth -= 1
        if kind._depth == 0:
            for name, kept in kind._kept.items():
                setattr(torch.cuda, name, kept)
        return super().__exit__(*error)

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
    """Return the scope of every call into megatron-core's schedules, data parallel, optimizer."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()


def model_scope() -> contextlib.AbstractContextManager[Any]:
    """Return the scope of our own model inside a schedule: the one above costs per operation."""
    return (
        contextlib.nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction()
    )
