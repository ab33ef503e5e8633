"""Copies in host memory of what a checkpoint is written from."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.sharded_state import Boxes, State
from pretrain.parallel.processes import local_device

_ALIGNMENT = 64


class Staging:
    """Host memory that states are copied to, the same one every time, pinned where there is a GPU.

    A GPU fills pinned memory at the speed of its bus and without the host; to pin it anew for every
    save would take longer than the copy.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        gpu = local_device().type == "cuda"
        # torch.cpu has streams that do nothing, under the same names.
        self._runtime: Any = torch.cuda if gpu else torch.cpu
        self._pin, self._stream = gpu, self._runtime.Stream()

    def copy(self, state: State) -> tuple[State, Callable[[], None]]:
        """Begin to copy ``state`` as it is now; the copies of before are overwritten.

        Returns the copies, and a function that waits until they are complete, on any thread. What
        is queued on the GPU after this call may change the tensors of ``state``.
        """
        targets = self._targets(state)
        # Copies begin when what is queued so far has made the tensors. In turn all that is queued
        # from now on begins when they are made: the next update, and whatever else changes a tensor
        # or takes the memory of one that is freed, needs to know nothing of them. The GPU waits for
        # its bus, a fraction of a second; the host waits only where it reads the copies.
        training, done = self._runtime.current_stream(), self._runtime.Event()
        self._stream.wait_stream(training)
        with self._runtime.stream(self._stream):
            for name, boxes in state.items():
                for offsets, tensor in boxes.parts.items():
                    targets[name].parts[offsets].copy_(tensor, non_blocking=True)
            done.record()
        training.wait_stream(self._stream)
        return targets, done.synchronize

    def free(self) -> None:
        """Give the memory back, as soon as no copies are left."""
        self._memory = None

    def _targets(self, state: State) -> State:
        """Return boxes of the same shapes, whose values lie one after another in the memory."""
        needed = sum(_room(t) for boxes in state.values() for t in boxes.parts.values())
        if self._memory is None or len(self._memory) < needed:
            self.free()  # first: both need not fit
            self._memory = _allocate(needed, pin=self._pin)
        content, start, targets = self._memory.numpy(), 0, dict[str, Boxes]()
        for name, boxes in state.items():
            parts = []
            for offsets, tensor in boxes.parts.items():
                # By NumPy, for a storage of its own: formats write storages, not views of them.
                values = torch.from_numpy(content[start : start + tensor.nbytes])
                parts.append((offsets, values.view(tensor.dtype).view(tensor.shape)))
                start += _room(tensor)
            targets[name] = Boxes(boxes.full_shape, parts)
        return targets


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _allocate(size: int, *, pin: bool) -> Tensor:
    """Return so many bytes of host memory, pinned if wanted and possible.

    Not by ``pin_memory``, which takes the next power of two and keeps it for later.
    """
    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    if not pin or size == 0:
        return memory
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    if int(runtime.cudaHostRegister(address, size, 0)) == 0:
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    else:  # more than this machine can pin, so copies are slower
        with contextlib.suppress(RuntimeError):  # CUDA tells it again to whoever launches next
            torch.zeros(1, device=local_device())
    return memory
