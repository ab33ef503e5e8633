"""How long layers that hand their states on wait for each other; a part of context_cpu.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.data.sequences import Segment, Sequences, segment_of
from pretrain.nn.mixers.base import Mixer, State
from pretrain.nn.mixers.over_segments import mix
from pretrain.ops.chain import open_chain
from pretrain.parallel.segments import Handover

LAYERS, SLOT = 8, 0.05  # seconds


class Clock:
    """The slots that have passed on this rank, by who waited for whom."""

    def __init__(self) -> None:
        self.now, self.again = 0.0, False

    def tick(self, not_before: float) -> float:
        """Sleep for a slot, which begins once this rank is free and its state is there."""
        time.sleep(SLOT)
        self.now = max(self.now, not_before) + 1
        return self.now


class _Slot(torch.autograd.Function):
    """A layer over a segment, whose state, and whose state's gradient, say when it was done."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        ctx.clock = clock
        ctx.save_for_backward(x)  # which a checkpoint has to compute again
        # Computed again it waits for nothing: what it received is still there.
        not_before = 0.0 if clock.again else float(state.max())
        return x.view_as(x), torch.full_like(state, clock.tick(not_before))

    @staticmethod
    def backward(ctx: Any, d_x: Tensor, d_state: Tensor) -> tuple[Tensor, Tensor, None]:
        assert len(ctx.saved_tensors) == 1
        return d_x, torch.full_like(d_state, ctx.clock.tick(float(d_state.max()))), None


class SlotLayer(Mixer):
    """A mixer that takes a slot for each segment and is handed on by its state."""

    def __init__(self, clock: Clock):
        nn.Module.__init__(self)
        self.clock = clock

    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Pass x on a slot later."""
        before = self.init_state(1) if state is None else state
        y, done = _Slot.apply(x, before["done"], self.clock)
        return y, {"done": done}

    def init_state(self, batch_size: int) -> State:
        """Return that nothing has been done."""
        # A gradient of it wanted, as where it comes from another rank.
        return {"done": torch.zeros(batch_size, 1, requires_grad=torch.is_grad_enabled())}

    @classmethod
    def num_parameters(cls, config: Any, hidden_size: int) -> int:
        """Return that it has none."""
        return 0

    @classmethod
    def flops_per_token(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        """Return that it does nothing."""
        return 0

    @classmethod
    def state_bytes(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        """Return those of one number."""
        return 4


def stagger() -> list[dict[str, Any]]:
    """Return the slots of 2 and of all ranks, measured and counted, by direction."""
    rank, found = dist.get_rank(), []
    for size in (2, dist.get_world_size()):
        group = dist.new_subgroups(size)[0]
        open_chain(group, timedelta(minutes=1))
        pieces = segment_of(Sequences.from_lengths([size]), rank % size, size, group)
        plain, checkpointed = (_slots(pieces, again) for again in (False, True))
        found.append({"ranks": size, "slots": [*plain, checkpointed[1]]})
    return found


def _slots(pieces: Sequences, again: bool) -> list[tuple[float, float]]:
    """Return slots of the forward and of the backward pass, measured and counted."""
    clock, segment = Clock(), pieces.segment
    assert isinstance(segment, Segment)
    layers = [SlotLayer(clock) for _ in range(LAYERS)]
    x = torch.zeros(1, 1, 1, requires_grad=True)

    def forward() -> Tensor:
        y = x
        for layer in layers:
            handover = Handover()
            run = partial(_mixed, layer, sequences=pieces, handover=handover)
            y = checkpoint(run, y, use_reentrant=False) if again else run(y)
        return y

    found = []
    run: Callable[[], Tensor | None] = forward
    for _ in ("forward", "backward"):
        dist.barrier(group=segment.group)
        clock.now, begun = 0.0, time.perf_counter()
        y = run()
        times = torch.tensor([(time.perf_counter() - begun) / SLOT, clock.now])
        dist.all_reduce(times, dist.ReduceOp.MAX, group=segment.group)
        found.append((float(times[0]), float(times[1])))
        if y is not None:
            run, clock.again = y.sum().backward, True
    return found


def _mixed(layer: SlotLayer, x: Tensor, sequences: Sequences, handover: Handover) -> Tensor:
    return mix(layer, x, sequences, None, handover)[0]
