"""Any mixer over the segments of a row, by the state that it keeps from call to call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pretrain.data.sequences import Segment, Sequences, pieces_alone
from pretrain.nn.mixers.base import Mixer, State, states_if, states_wanted
from pretrain.parallel.segments import Handover


def beyond_segments(mixer: Mixer) -> bool:
    """Return whether a mixer itself looks beyond a segment of a row, by its ops."""
    if mixer.over_time == "cells":
        return mixer.parallel.cells_over_heads(mixer.num_heads)
    return mixer.over_time == "ops"


def mix(
    mixer: Mixer,
    x: Tensor,
    sequences: Sequences | None,
    state: State | None,
    handover: Handover,
    first: dict[str, Tensor] | None = None,
) -> tuple[Tensor, State]:
    """Run a mixer on x ``[T, B, d]``; where that is a segment of a row, as on the whole row.

    A mixer whose ops know segments gets them as they are. Any other goes on from the state of the
    segment before and hands its own to the next one, one after another; layers take turns, so that
    a rank is in one layer while the rank before is in the next. ``state``: what the pieces that
    begin here go on from, of which that of a piece that began before only counts tokens before the
    row. ``first``: what the first block of a kind hands on, for the mixers that know of it.
    """
    run = mixer if first is None else partial(mixer, first=first)
    segment = None if sequences is None else sequences.segment
    if sequences is None or segment is None or segment.group is None:
        return run(x, sequences=sequences, state=state)
    with handover.kept.running():
        if beyond_segments(mixer):
            return run(x, sequences=sequences, state=state)
        return _handed_on(run, mixer, x, sequences, segment, state, handover)


def _handed_on(
    run: Callable[..., tuple[Tensor, State]],
    mixer: Mixer,
    x: Tensor,
    sequences: Sequences,
    segment: Segment,
    state: State | None,
    handover: Handover,
) -> tuple[Tensor, State]:
    """Run a mixer from the state of the segment before, and hand its own to the next one."""
    pieces, receives, sends = pieces_alone(sequences), segment.crosses(-1), segment.crosses(+1)
    if not sends and not receives:
        return run(x, sequences=pieces, state=state)
    empty = mixer.init_state(1)
    if receives:
        entering = handover.receive(segment, empty, _is_trained(mixer, x))
        if pieces.count == 1:
            state = entering
        elif state is None:
            state = mixer.join_states([entering, mixer.init_state(pieces.count - 1)])
        else:
            others = mixer.select_state(state, torch.arange(1, pieces.count, device=x.device))
            state = mixer.join_states([entering, others])
    with states_if(sends or states_wanted()):
        y, new = run(x, sequences=pieces, state=state)
    if sends:
        last = torch.tensor([pieces.count - 1], device=y.device)
        y = handover.send(segment, y, mixer.select_state(new, last), empty)
    return y, new


def _is_trained(mixer: Mixer, x: Tensor) -> bool:
    """Return whether a gradient goes through a mixer on x, the same on every rank."""
    inputs = (x, *mixer.parameters())
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
