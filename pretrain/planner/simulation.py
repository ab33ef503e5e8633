"""Simulation of model code on tensors that have shapes but no values.

It finds what the code allocates, computes, reads and writes, without memory or a device.
Floating-point tensors are on the meta device; integers that say where sequences begin stay real,
because the layers' control flow depends on them. Where it depends on a number (has Newton's method
converged?), the ops themselves say what is usual on the meta device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from pretrain.ops.shared.planning import Work, WorkKind, planned_device
from pretrain.planner.cost import Cost, Kernel
from pretrain.planner.fake_group import CONTEXT
from pretrain.planner.messages import bytes_sent, group_of
from pretrain.planner.software import Software

_aten: Any = torch.ops.aten
_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_LOOKUPS = {
    _aten.index.Tensor,
    _aten.index_select.default,
    _aten.embedding.default,
    _aten.gather.default,
}


# They allocate, or name what is there already: nothing runs on the device.
_FREE = {
    _aten._unsafe_view.default,
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm}
# What torch's counter of FLOPs does not know, by what it does.
_IN_PLACE = {_aten.addmm_: _aten.addmm, _aten.baddbmm_: _aten.baddbmm}


_limit: ContextVar[float] = ContextVar("_limit", default=float("inf"))


class TooManyOperationsError(Exception):
    """A simulation has more operations than its limit."""


@contextmanager
def operations_limited(limit: int) -> Iterator[None]:
    """Let simulations of more than ``limit`` operations raise TooManyOperationsError."""
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)


class Simulation(TorchDispatchMode):
    """A context that counts operations on meta tensors, and the memory that they would take."""

    def __init__(self, device: str, software: Software):
        super().__init__()
        self._live = 0
        self._cost = Cost()
        self._received: Cost | None = None  # what had been counted when a message came
        self._base = 0
        self._known: dict[int, Any] = {}
        fused = software.elementwise == "fused"
        self._planned = planned_device(
            device, self._kernel, fused=fused, shares_keys=software.shares_keys
        )

    def __enter__(self) -> Simulation:
        self._planned.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._planned.__exit__(*error)

    def measure(self, function: Callable[[], Any]) -> tuple[Any, Cost]:
        """Return the result of ``function``, and its cost; what the result holds is ``kept``."""
        self._cost, self._base, self._received = Cost(), self._live, None
        result = function()
        self._cost.kept = self._live - self._base
        return result, self._cost

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """Exclude tensors that were there before from the count."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "c10d":
            return self._communicate(function, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_meta = any(x.is_meta for x in tensors)
        if on_meta and function is _aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0
        if on_meta:
            if function in _INDEXED:
                args = (args[0], _without_masks(args[1]), *args[2:])
            if not args or not isinstance(args[0], Tensor) or not _writes_real(function, args[0]):
                args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
            else:
                return args[0]
        result = function(*args, **kwargs)
        # Made from nothing or from integers: every floating-point tensor is on the meta device.
        result = tree_map_only(
            Tensor, lambda x: _to_meta(x) if x.is_floating_point() else x, result
        )
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in outputs:
            self._notice(x)
        if on_meta or any(x.is_meta for x in outputs):
            self._count(function, args, kwargs, result, tensors, outputs)
        return result

    def _notice(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def forget(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self._live -= size

        self._known[key] = weakref.ref(storage, forget)
        self._live += size
        self._cost.peak = max(self._cost.peak, self._live - self._base)

    def _count(
        self,
        function: Any,
        args: Any,
        kwargs: Any,
        result: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        self._cost.operations += 1
        if self._cost.operations > _limit.get():
            raise TooManyOperationsError
        if function.is_view or function in _FREE or not outputs:
            return
        packet = _IN_PLACE.get(function._overloadpacket, function._overloadpacket)
        formula = flop_registry.get(packet)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        moved = sum(map(_bytes, outputs))
        # A lookup reads no more than it returns.
        moved += moved if function in _LOOKUPS else sum(map(_bytes, inputs))
        kind: WorkKind = "product" if packet in _PRODUCTS else "elementwise"
        dtype = inputs[0].dtype if kind == "product" else outputs[0].dtype
        self._cost.add(Kernel(Work(flops, kind=kind), moved, dtype))

    def _kernel(self, work: Work, moved: float, dtype: torch.dtype) -> None:
        """Count a kernel of which torch sees nothing."""
        self._cost.operations += 1
        self._cost.add(Kernel(work, moved, dtype))

    def _communicate(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Count a collective without sending: the fake group must not see meta tensors."""
        group = group_of(args)
        assert group is not None
        sent = bytes_sent(function.__name__, args, group)
        if group.group_desc == CONTEXT:
            self._cost.context_bytes += sent
            self._cost.context_messages += "recv" not in function.__name__
            if "recv" in function.__name__:
                self._cost.turn, self._received = Cost(), self._cost.plus(Cost(), 0)
            elif function.__name__.startswith("send") and self._received is not None:
                self._cost.turn = replace(self._cost.plus(self._received, -1), turn=None)
                self._received = None
        else:
            self._cost.bytes_sent += sent
            self._cost.collectives += group.size() > 1
        args, kwargs = tree_map_only(Tensor, lambda _: torch.empty(0), (args, kwargs))
        if "alltoall" in function.__name__:  # whose sizes would not be those of nothing
            args = [[] if isinstance(x, list) else x for x in args]
        return function(*args, **kwargs)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _to_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _writes_real(function: Any, first: Tensor) -> bool:
    """Return whether a function writes to a tensor with values, which then do not matter."""
    return not first.is_meta and function._schema.is_mutable


def _without_masks(indices: Any) -> list[Any]:
    """Return indices with boolean masks replaced by the positions where they are true."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found
