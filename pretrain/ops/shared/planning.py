"""Tensors without values that stand for ones on a device, for plans made of the ops.

While a plan is made, an op that would run a fused kernel on the planned device calls
:func:`stand_in`: it allocates what the kernel would return, keeps for the backward pass what the
kernel would keep, and reports the work of both passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

WorkKind = Literal["product", "attention", "delta_rule", "linear_attention", "elementwise", "scan"]


@dataclass(frozen=True)
class Work:
    """The work of a kernel, for plans.

    Attributes:
        flops: matrix-multiply FLOPs.
        instructions: instructions of warps that it issues, counted from its compiled code.
        cycles: length of its longest chain of steps that wait for each other.
        kind: what limits it: see ``pretrain.planner.hardware``.
        chain: microseconds of such a chain at least, where that is what is known of it.
        host: microseconds that Python needs before it is launched, beyond an operation's.
        width: channels of an attention head.
    """

    flops: float = 0.0
    instructions: float = 0.0
    cycles: float = 0.0
    kind: WorkKind = "scan"
    chain: float = 0.0
    host: float = 0.0
    width: int = 0

    def share(self, part: float) -> Work:
        """Scale the counts by ``part``."""
        return Work(
            self.flops * part,
            self.instructions * part,
            self.cycles * part,
            self.kind,
            self.chain * part,
            self.host,
            self.width,
        )


# (work, bytes that it reads and writes, dtype) of a kernel that would run
Observer = Callable[[Work, float, torch.dtype], None]


@dataclass(frozen=True)
class Plan:
    """Say what a plan is made for.

    Attributes:
        device: Type of the device that tensors on the meta device stand for.
        observer: Called with every kernel that would run.
        fused: Whether chains of elementwise operations are one kernel.
        shares_keys: Whether heads that share a key read the same one, in place of copies.
    """

    device: str = "cpu"
    observer: Observer | None = None
    fused: bool = True
    shares_keys: bool = False


_UNPLANNED = Plan()
_plan: ContextVar[Plan] = ContextVar("_plan", default=_UNPLANNED)


@contextmanager
def planned_device(
    kind: str,
    observer: Observer | None = None,
    *,
    fused: bool = True,
    shares_keys: bool = False,
) -> Iterator[None]:
    """Let tensors on the meta device stand for ones on a device of type ``kind`` while open.

    ``observer`` is called with every kernel that would run.
    """
    token = _plan.set(Plan(kind, observer, fused, shares_keys))
    try:
        yield
    finally:
        _plan.reset(token)


def observe(work: Work, moved: float, dtype: torch.dtype) -> None:
    """Report a kernel that would run, and the bytes that it reads and writes, to whoever plans."""
    observer = _plan.get().observer
    if observer is not None:
        observer(work, moved, dtype)


def device_type(x: Tensor) -> str:
    """Return the type of x's device; on the meta device, of the one that x stands for."""
    return _plan.get().device if x.is_meta else x.device.type


def is_planned(*tensors: Any, device: str = "cuda") -> bool:
    """Return whether a tensor among the arguments stands for one on such a device."""
    return any(isinstance(x, Tensor) and x.is_meta for x in tensors) and (
        _plan.get().device == device
    )


def plans_fused(*tensors: Any) -> bool:
    """Return whether elementwise operations on the tensors are planned as one GPU kernel."""
    return is_planned(*tensors) and _plan.get().fused


def plans_shared_keys(x: Tensor) -> bool:
    """Return whether the planned kernels take one key for the heads that share it."""
    return is_planned(x) and _plan.get().shares_keys


def shared_stand_in(x: Tensor, times: int) -> Tensor:
    """Stand for ``[B, T, 1, dim]`` read by ``times`` heads, whose kernel sums its gradient."""
    found: Tensor = _Shared.apply(x, times)
    return found


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, times: int) -> Tensor:
        return x.expand(-1, -1, times, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return torch.empty_like(gradients[0][:, :, :1]), None


def count_true(mask: Tensor, assumed: int) -> int:
    """Return how many elements are true; ``assumed`` on the meta device, where none has a value."""
    return assumed if mask.is_meta else int(mask.sum())


def stand_in(
    inputs: Sequence[Tensor],
    outputs: Callable[[], tuple[Tensor, ...]],
    forward: tuple[Work, float],
    backward: tuple[Work, float],
    extra: Callable[[], tuple[Tensor, ...]] = tuple,
    unread: int = 0,
) -> tuple[Tensor, ...]:
    """Return what a kernel would, and report its work and bytes in both passes.

    ``inputs`` but the first ``unread`` are kept for the backward pass, with what ``extra``
    allocates.
    """
    results: Any = _StandIn.apply(outputs, extra, forward, backward, unread, *inputs)
    return results if isinstance(results, tuple) else (results,)


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        outputs: Callable[[], tuple[Tensor, ...]],
        extra: Callable[[], tuple[Tensor, ...]],
        forward: tuple[Work, float],
        backward: tuple[Work, float],
        unread: int,
        *inputs: Tensor,
    ) -> Any:
        results = outputs()
        ctx.save_for_backward(*inputs[unread:], *extra())
        ctx.work = backward
        ctx.shapes = [(x.size(), x.stride(), x.dtype) for x in inputs]
        work, moved = forward
        observe(work, moved, results[0].dtype)
        return results if len(results) > 1 else results[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _ = ctx.saved_tensors  # as the kernel reads them, which may compute them again
        work, moved = ctx.work
        observe(work, moved, gradients[0].dtype)
        made = [
            torch.empty_strided(size, stride, dtype=dtype, device="meta") if needed else None
            for (size, stride, dtype), needed in zip(
                ctx.shapes, ctx.needs_input_grad[5:], strict=True
            )
        ]
        return None, None, None, None, None, *made


def fused_stand_in(
    function: Callable[..., Any], arguments: tuple[Any, ...], *, linear: bool = False
) -> Any:
    """Return what an elementwise ``function`` would, as one kernel that reads and writes once.

    It keeps its inputs, but the first where it is ``linear``. The backward kernel reads them and
    the outputs' gradients, and writes the inputs' gradients.
    """
    inputs = [x for x in arguments if isinstance(x, Tensor)]
    with _disable_current_modes(), torch.no_grad():
        plain = iter([torch.empty_like(x, device="meta") for x in inputs])
        found = function(*(next(plain) if isinstance(x, Tensor) else x for x in arguments))
    single = isinstance(found, Tensor)
    shapes = (found,) if single else tuple(found)
    read, kept, written = nbytes(inputs), nbytes(inputs[linear:]), nbytes(shapes)
    work = Work(kind="elementwise")
    results = stand_in(
        inputs,
        lambda: tuple(torch.empty_like(x) for x in shapes),
        (work, read + written),
        (work, kept + written + nbytes(x for x in inputs if x.requires_grad)),
        unread=int(linear),
    )
    return results[0] if single else results


def nbytes(tensors: Iterable[Tensor]) -> float:
    """Return the bytes of all tensors together."""
    return float(sum(x.numel() * x.element_size() for x in tensors))


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    """Call torch's attention; in a plan for a CPU, what stands for its fused kernel."""
    if not q.is_meta or not _cpu_is_fused(q, k, v, **settings):
        return F.scaled_dot_product_attention(q, k, v, **settings)
    length = k.shape[2]
    seen = (length + 1) / (2 * length) if settings.get("is_causal") else 1.0
    return planned_attention(q, k, v, 4 * seen * q.numel() * length)


def planned_attention(q: Tensor, k: Tensor, v: Tensor, flops: float) -> Tensor:
    """Return what a fused attention kernel would, of q ``[B, H, T, D]``, k, v ``[B, Hkv, S, D]``.

    ``flops`` are those of the pairs that it computes, forward. The kernel keeps its output and a
    number per query, and computes the weights again in the backward pass.
    """
    output: Tensor = _PlannedAttention.apply(flops, nbytes((q, k, v, q)), q, k, v)
    return output


class _PlannedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flops: float, moved: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # As CPU and GPU kernels lay it out: tokens before heads.
        output = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        sums = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, output, sums)
        ctx.flops, ctx.moved = flops, moved
        observe(Work(flops, kind="attention", width=q.shape[-1]), moved, q.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        work = Work(2.5 * ctx.flops, kind="attention", width=q.shape[-1])
        observe(work, 2 * ctx.moved, q.dtype)
        return None, None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


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
