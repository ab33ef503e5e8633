"""Recomputation of cheap results in the backward pass: selective activation checkpointing.

Within :func:`recomputing`, a call through :func:`recomputed` keeps its inputs alone. What autograd
would keep of its results, and of what is computed inside it, is kept as a recipe instead: the call,
and which of its tensors. The first one that the backward pass asks for runs the function again, and
all others are taken from that run. Inputs that are themselves results of such a call are recipes
too. Everything else is kept as it is: matrix products, attention, recurrences, collectives.

The graph is that of the first run, so gradients are the same to the last bit. Recipes are found by
the memory of a tensor, so any view of a result has one; unlike ``torch.utils.checkpoint``'s
selective contexts this serves autograd functions and kernels that torch's dispatcher does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_ATTRIBUTE = "recipe"  # of the memory of a result

_swapped: ContextVar[Sequence[Tensor] | None] = ContextVar("_swapped", default=None)


@contextmanager
def recomputing(swapped: Sequence[Tensor] | None = None) -> Iterator[None]:
    """Let calls through :func:`recomputed` keep their inputs alone while open.

    ``swapped``: parameters whose memory is taken away after the forward pass and given back before
    the backward pass (ZeRO-3), which are kept as themselves; None: those of the scope around.
    """
    token = _swapped.set(_swapped.get() or () if swapped is None else swapped)
    try:
        with saved_tensors_hooks(_pack_result, _unpack):
            yield
    finally:
        _swapped.reset(token)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)``, a tensor or a tuple, which the backward pass may run again.

    The function must be cheap, give the same result whenever it runs, send nothing and change
    nothing. Outside :func:`recomputing` and without gradients this is the plain call.
    """
    if _swapped.get() is None or not torch.is_grad_enabled():
        return function(*arguments)
    return _Call(function, arguments).first_run()


@dataclass(frozen=True)
class _Kept:
    """A tensor that is kept, and its version when it was."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was "
                f"changed in place: it is at version {self.tensor._version}, expected "
                f"{self.version}"
            )
        return self.tensor


@dataclass(frozen=True)
class _Swapped:
    """A parameter that has its values again when the backward pass asks for it."""

    parameter: Tensor

    def unpack(self) -> Tensor:
        return self.parameter.detach()


@dataclass(frozen=True)
class _Recipe:
    """The mark on the memory of a call's result: which one, and how it lies there."""

    call: _Call
    number: int
    layout: tuple[Any, ...]
    dtype: torch.dtype
    version: int


class _Part:
    """A view of a tensor that a call makes: result ``number`` or, below 0, one inside it."""

    def __init__(self, call: _Call, number: int, view: Tensor):
        self._call, self._number, self._layout = call, number, _layout(view)
        self._waits = True
        call.waiting += 1

    def unpack(self) -> Tensor:
        whole = self._call.made()[self._number]
        self._release()
        if _layout(whole) == self._layout:
            return whole
        return whole.as_strided(*self._layout)

    def _release(self) -> None:
        if self._waits:
            self._waits = False
            self._call.release()

    def __del__(self) -> None:
        self._release()


_Packed = _Kept | _Swapped | _Part


class _Call:
    """A call of a function that can be run again.

    Attributes:
        waiting: Tensors of the call that the backward pass has not asked for yet.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]):
        self._function, self._given = function, arguments
        self.waiting = 0
        self._made: dict[int, Tensor] | None = None
        self._layouts: dict[int, tuple[Any, ...]] = {}
        self._saved = 0  # tensors that autograd has saved inside the call so far
        self._autocast = [
            partial(torch.autocast, kind, torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ]

    def first_run(self) -> Any:
        given = [x for x in self._given if isinstance(x, Tensor)]
        own = {_memory(x) for x in given}
        reused, inside = set[int](), 0
        running = [self]  # autograd holds pack as long as what it packed, but not the call

        def pack(tensor: Tensor) -> _Packed:
            nonlocal inside
            (call,) = running
            call._saved += 1
            if _memory(tensor) in own:
                reused.add(_memory(tensor))
                return _pack(tensor)
            inside += _nbytes(tensor)
            call._layouts[-call._saved] = _layout(tensor)
            return _Part(call, -call._saved, tensor)

        token = _swapped.set(None)  # calls inside this one are parts of it
        try:
            with saved_tensors_hooks(pack, _unpack):
                results = self._function(*self._given)
        finally:
            _swapped.reset(token)
            running.clear()
        packed = [_pack(x) if isinstance(x, Tensor) else x for x in self._given]
        # What only this call would keep must be less than what it spares.
        alone = sum(
            _nbytes(x)
            for x, keep in zip(self._given, packed, strict=True)
            if isinstance(keep, _Kept) and _memory(x) not in reused
        )
        outputs = results if isinstance(results, tuple) else (results,)
        fresh = {
            n: x
            for n, x in enumerate(outputs)
            if isinstance(x, Tensor) and x.requires_grad and _memory(x) not in own
        }
        if alone < inside + sum(map(_nbytes, fresh.values())):
            for number, output in fresh.items():
                layout = self._layouts[number] = _layout(output)
                recipe = _Recipe(self, number, layout, output.dtype, output._version)
                setattr(output.untyped_storage(), _ATTRIBUTE, recipe)
        self._wanted = [isinstance(x, Tensor) and x.requires_grad for x in self._given]
        self._given = tuple(packed)
        return results

    def made(self) -> dict[int, Tensor]:
        """Return the tensors of the call by their numbers, computed once for all that wait."""
        if self._made is None:
            self._made = self._run_again()
        return self._made

    def _run_again(self) -> dict[int, Tensor]:
        arguments = [
            x.unpack().detach().requires_grad_(wanted) if isinstance(x, _Packed) else x
            for x, wanted in zip(self._given, self._wanted, strict=True)
        ]
        found: dict[int, Tensor] = {}
        count = 0

        def pack(tensor: Tensor) -> None:
            nonlocal count
            count += 1
            if -count in self._layouts:
                found[-count] = tensor

        def unpack(_: None) -> Tensor:
            raise RuntimeError("the second run of a call has no backward pass")

        # With gradients, as at first: a compiled function then is the same kernel.
        with ExitStack() as scopes:
            scopes.enter_context(torch.enable_grad())
            for autocast in self._autocast:
                scopes.enter_context(autocast())
            scopes.enter_context(saved_tensors_hooks(pack, unpack))
            results = self._function(*arguments)
        outputs = results if isinstance(results, tuple) else (results,)
        for number, output in enumerate(outputs):
            if number in self._layouts:
                found[number] = output.detach()
        layouts = {number: _layout(tensor) for number, tensor in found.items()}
        if count != self._saved or layouts != self._layouts:
            name = getattr(self._function, "__name__", str(self._function))
            raise RuntimeError(
                f"{name} made other tensors when the backward pass ran it again: found {layouts}, "
                f"expected {self._layouts}"
            )
        return found

    def release(self) -> None:
        self.waiting -= 1
        if not self.waiting:
            self._made = None


def _pack(tensor: Tensor) -> _Packed:
    """Return what is kept for a tensor that the backward pass needs."""
    recipe: _Recipe | None = getattr(tensor.untyped_storage(), _ATTRIBUTE, None)
    if recipe is not None and (tensor.dtype, tensor._version) == (recipe.dtype, recipe.version):
        return _Part(recipe.call, recipe.number, tensor)
    return _Kept(tensor.detach(), tensor._version)


def _pack_result(tensor: Tensor) -> _Packed:
    """Return what is kept for a tensor that something else than a call needs.

    A call may run again while its parameters' memory is away, and keeps the values: they are few.
    """
    for parameter in _swapped.get() or ():
        if parameter.data_ptr() == tensor.data_ptr() and _layout(parameter) == _layout(tensor):
            return _Swapped(parameter)
    return _pack(tensor)


def _unpack(packed: _Packed) -> Tensor:
    return packed.unpack()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
