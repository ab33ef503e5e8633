"""Hand states and keys from segment to segment of a row: context parallelism, NCCL or gloo.

Each context-parallel rank has one :class:`.Segment` of every row. A recurrence goes on in the next
segment from the state that the one before has sent, and the gradient of that state comes back in
the backward pass; attention gathers keys and values. What has to be sent is known from the row's
sequences alone: where no sequence goes on, nothing is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.data.sequences import Segment, Sequences
from pretrain.ops.chain import Kept, Kind, receive, send

State = dict[str, Tensor]


class Handover:
    """The state that one layer receives, and the one that it sends, in one forward pass.

    Attributes:
        kept: What was received, for a block that runs again.
    """

    def __init__(self) -> None:
        self.kept = Kept()

    def receive(self, segment: Segment, empty: State, trained: bool) -> State:
        """Return the state that the segment's first sequence goes on from.

        ``empty`` is that of one sequence before any token. ``trained``: whether the layer's output
        has a gradient on the other ranks; the state then has one too, and else none.
        """
        names = sorted(empty)
        kinds: list[Kind] = [(empty[name].shape, empty[name].dtype) for name in names]
        device = empty[names[0]].device
        if _grows(empty):
            (sizes,) = receive(segment, -1, [((len(names),), torch.int64)], device)
            kinds = [
                ((size, *shape[1:]), dtype)
                for size, (shape, dtype) in zip(sizes.tolist(), kinds, strict=True)
            ]
        received = receive(segment, -1, kinds, device)
        # In the graph wherever the rank before waits for the gradient, and nowhere else.
        anchor = torch.zeros((), requires_grad=trained)
        found = _Received.apply(anchor, segment, *received)
        return dict(zip(names, found, strict=True))

    def send(self, segment: Segment, y: Tensor, state: State, empty: State) -> Tensor:
        """Send the state of the segment's last sequence to the next rank.

        Returns y, whose backward pass waits for the state's gradient.
        """
        tensors = [state[name] for name in sorted(empty)]
        if _grows(empty):
            sizes = [len(tensor) for tensor in tensors]
            send(segment, +1, [torch.tensor(sizes, device=y.device)])
        send(segment, +1, tensors)
        result: Tensor = _Sent.apply(y, segment, *tensors)
        return result


def _grows(empty: State) -> bool:
    """Return whether a state of one sequence has tensors without an axis of sequences."""
    return any(tensor.shape[:1] != (1,) for tensor in empty.values())


class _Received(torch.autograd.Function):
    """What was received; its gradient goes to the rank before."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, segment: Segment, *received: Tensor) -> tuple[Tensor, ...]:
        ctx.segment = segment
        found = tuple(tensor.view_as(tensor) for tensor in received)
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        ctx.floating = [x.is_floating_point() for x in found]
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        send(ctx.segment, -1, [g for g, real in zip(gradients, ctx.floating, strict=True) if real])
        return (None, None, *(None for _ in gradients))


class _Sent(torch.autograd.Function):
    """The identity on y; the gradient of the states that were sent comes from the next rank."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, segment: Segment, *state: Tensor) -> Tensor:
        ctx.segment = segment
        ctx.kinds = [(x.shape, x.dtype) for x in state]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kinds = [(shape, dtype) for shape, dtype in ctx.kinds if dtype.is_floating_point]
        received = iter(receive(ctx.segment, +1, kinds, gradients[0].device))
        of_states = [next(received) if dtype.is_floating_point else None for _, dtype in ctx.kinds]
        return gradients[0], None, *of_states


def keys_so_far(
    k: Tensor, v: Tensor, sequences: Sequences, window: int | None
) -> tuple[Tensor, Tensor, Sequences]:
    """Return the keys and values ``[S, H, D]`` that a segment's queries see, and where they lie.

    k and v ``[L, H, D]`` are those of its own tokens. The ones before of the sequence that goes on
    here, or the last ``window - 1`` of them, come from the ranks before; their gradients go back.
    """
    segment = sequences.segment
    if segment is None or not any(segment.continues):
        return k, v, sequences
    own = len(k)
    both = _GatheredOverTime.apply(torch.cat([k, v], -1), segment.group)
    begins = segment.rank * own
    visible = segment.seen if window is None else min(segment.seen, window - 1)
    k, v = both[begins - visible : begins + own].split([k.shape[-1], v.shape[-1]], -1)
    return k, v, sequences.derive(_with_seen, visible)


def together(y: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Return tensors unchanged; the backward pass of the others runs wherever that of y does.

    A rank on which nothing depends on what was gathered must enter the backward pass of the
    gathering all the same: the other ranks wait for it there.
    """
    result: tuple[Tensor, ...] = _Together.apply(y, *others)
    return result


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients  # zeros where there was none


def _with_seen(sequences: Sequences, seen: int) -> Sequences:
    first, *others = sequences.lengths
    return Sequences.from_lengths([seen + first, *others], sequences.device)


class _GatheredOverTime(torch.autograd.Function):
    """All ranks' tokens ``[T, ...]``; gradients are summed in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        full = x.new_empty(len(x) * group.size(), *x.shape[1:])
        dist.all_gather_into_tensor(full, x.contiguous(), group=group)
        return full

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).contiguous()
        local = wide.new_empty(len(wide) // ctx.group.size(), *wide.shape[1:])
        dist.reduce_scatter_tensor(local, wide, group=ctx.group)
        return local.to(gradient.dtype), None
