"""Simulation of model code on tensors that have shapes but no values.

It finds what the code allocates, computes, reads and writes, without memory or a device.
Floating-point tensors are on the meta device; integers that say where sequences begin stay real,
because the layers' control flow depends on them. Where it depends on a number (has Newton's method
converged?), the ops themselves say what is usual on the meta device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from pretrain.ops.shared.planning import Work, planned_device
from pretrain.planner.hardware import Hardware

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


@dataclass
class Cost:
    """The cost of running something on one device.

    Attributes:
        peak: Most bytes newly allocated at a time.
        kept: Bytes still allocated at the end.
        seconds: Seconds of the device.
        flops: FLOPs of matrix multiplications.
        operations: Number of operations.
        bytes_sent: Bytes sent between tensor-parallel processes.
        collectives: Collectives between them.
    """

    peak: float = 0.0
    kept: float = 0.0
    seconds: float = 0.0
    flops: float = 0.0
    operations: float = 0.0
    bytes_sent: float = 0.0
    collectives: float = 0.0

    def plus(self, other: Cost, times: float) -> Cost:
        """Return ``self + times * other``, field by field."""
        pairs = {
            f.name: getattr(self, f.name) + times * getattr(other, f.name) for f in fields(self)
        }
        return Cost(**pairs)


class Simulation(TorchDispatchMode):
    """A context that counts operations on meta tensors, and the memory that they would take."""

    def __init__(self, hardware: Hardware):
        super().__init__()
        self._hardware = hardware
        self._live = 0
        self._cost = Cost()
        self._base = 0
        self._known: dict[int, Any] = {}
        self._planned = planned_device(hardware.device, self._kernel, _planned_attention(self))

    def __enter__(self) -> Simulation:
        self._planned.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._planned.__exit__(*error)

    def measure(self, function: Callable[[], Any]) -> tuple[Any, Cost]:
        """Return the result of ``function``, and its cost; what the result holds is ``kept``."""
        self._cost, self._base = Cost(), self._live
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
        if function.is_view or not outputs:
            return
        formula = flop_registry.get(function._overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        moved = sum(map(_bytes, outputs))
        # A lookup reads no more than it returns.
        moved += moved if function in _LOOKUPS else sum(map(_bytes, inputs))
        self.compute(flops, moved, outputs[0].dtype)

    def compute(self, flops: float, moved: float, dtype: torch.dtype) -> None:
        """Count an operation: as long as its arithmetic, memory traffic or launch takes."""
        self._cost.flops += flops
        self._cost.seconds += self._hardware.seconds(flops, moved, dtype)

    def _kernel(self, work: Work, moved: float, dtype: torch.dtype) -> None:
        """Count a kernel of ours, of which torch sees nothing."""
        self._cost.operations += 1
        self._cost.flops += work.flops
        self._cost.seconds += max(
            self._hardware.seconds(work.flops, moved, dtype),
            self._hardware.kernel_seconds(work.instructions, work.cycles),
        )

    def _communicate(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Count a collective without sending: the fake group must not see meta tensors."""
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        boxed = next(
            x
            for x in args
            if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())
        )
        size = dist.ProcessGroup.unbox(boxed).size()
        name = function.__name__
        sent = (size - 1) / size * max(map(_bytes, tensors), default=0)
        self._cost.bytes_sent += sent * (2 if "allreduce" in name else 1)
        self._cost.collectives += size > 1
        args, kwargs = tree_map_only(Tensor, lambda _: torch.empty(0), (args, kwargs))
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


def _planned_attention(simulation: Simulation) -> Callable[..., Tensor]:
    """Return what stands for torch's attention: the kernel that the planned device would choose."""

    def attention(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        cuda = simulation._hardware.device == "cuda"
        if not q.is_meta or not (cuda or _cpu_is_fused(q, k, v, **settings)):
            return F.scaled_dot_product_attention(q, k, v, **settings)
        length = k.shape[2]
        seen = (length + 1) / (2 * length) if settings.get("is_causal") else 1.0
        output: Tensor = _Fused.apply(simulation, q, k, v, seen)
        return output

    return attention


def _cpu_is_fused(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> bool:
    """Return whether torch would choose a fused kernel, asked with tensors of a few tokens."""
    with _disable_current_modes():
        small = [
            torch.empty(1, x.shape[1], 2, x.shape[3], dtype=x.dtype, requires_grad=True)
            for x in (q, k, v)
        ]
        mask = settings.pop("attn_mask", None)
        settings["attn_mask"] = None if mask is None else torch.ones(2, 2, dtype=torch.bool)
        choose: Any = torch._fused_sdp_choice
        return choose(*small, **settings) == 1


class _Fused(torch.autograd.Function):
    """Attention that keeps its output and a number per query; q ``[B, H, T, D]``.

    The backward pass computes the weights again.
    """

    @staticmethod
    def forward(
        ctx: Any, simulation: Simulation, q: Tensor, k: Tensor, v: Tensor, seen: float
    ) -> Tensor:
        # As CPU and GPU kernels lay it out: tokens before heads.
        output = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        sums = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, output, sums)
        ctx.simulation = simulation
        ctx.flops = 4 * seen * q.numel() * k.shape[2]
        simulation.compute(ctx.flops, sum(map(_bytes, (q, k, v, output))), q.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, output, _ = ctx.saved_tensors
        moved = 2 * sum(map(_bytes, (q, k, v, output)))
        ctx.simulation.compute(2.5 * ctx.flops, moved, q.dtype)
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
