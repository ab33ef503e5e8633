"""The diagonal recurrence over a row that is divided over ranks: a scan of the segments' states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.data.sequences import Segment, Sequences
from pretrain.ops.across import carry, scan


def segmented_diagonal_scan(
    run: Callable[[Tensor], tuple[Tensor, Tensor]],
    a: Tensor,
    x: Tensor,
    initial_state: Tensor,
    sequences: Sequences,
    segment: Segment,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence on a segment, from the state that enters it.

    ``run(initial_state)`` is the op on the pieces alone; shapes are those of the definition. To the
    exchanges a channel is a head whose state is one number.
    """
    with torch.no_grad():
        first, last = sequences.lengths[0], sequences.lengths[-1]
        after = a[-last:].flip(0).cumprod(0).flip(0)  # of each token and those that follow
        following = torch.cat([after[1:], torch.ones_like(after[:1])])
        reads = a[:first].cumprod(0)
        end = (following * x[-last:]).sum(0)
        if not segment.through[segment.rank]:  # the last piece begins here
            end += after[0] * initial_state[-1]
        entering, transitions = scan(segment, after[0][:, None, None], end[:, None, None])
    if segment.continues[segment.rank]:
        initial_state = torch.cat([entering[None, :, 0, 0], initial_state[1:]])
    output, states = run(initial_state)
    output, states = carry(
        segment,
        output[None, ..., None],
        states[..., None, None],
        reads.conj()[..., None],
        transitions.conj(),
        reads[-1].conj()[:, None, None],
    )
    return output[0, ..., 0], states[..., 0, 0]
