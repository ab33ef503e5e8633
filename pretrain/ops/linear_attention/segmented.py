"""Linear attention over a row that is divided over ranks: a scan of the segments' states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.data.sequences import Segment, Sequences
from pretrain.ops.across import carry, scan
from pretrain.ops.shared.chunk_decay import bounded


def segmented_linear_attention(
    run: Callable[[Tensor], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor,
    sequences: Sequences,
    segment: Segment,
) -> tuple[Tensor, Tensor]:
    """Run linear attention on a segment, from the state that enters it.

    ``run(initial_state)`` is the op on the pieces alone. Log-decays are summed from the segment's
    end for the state that leaves it and from its start for what reads the one that enters, never as
    differences of a long running sum: those are off by 1e-3 after 100,000 tokens in float32.
    """
    with torch.no_grad():
        dtype, first, last = initial_state.dtype, sequences.lengths[0], sequences.lengths[-1]
        keys, values = k[0, -last:].to(dtype), v[0, -last:].to(dtype)
        reads = q[0, :first].to(dtype) * scale
        if log_decay is None:
            transition = over_first = keys.new_ones(keys.shape[1], 1, 1)
        else:
            decay = bounded(
                (log_decay if log_decay.ndim == 4 else log_decay[..., None])[0].to(dtype)
            )
            after = decay[-last:].flip(0).cumsum(0).flip(0)  # of each token and those that follow
            before = decay[:first].cumsum(0)
            transition, over_first = after[0].exp()[..., None], before[-1].exp()[..., None]
            following = torch.cat([after[1:], torch.zeros_like(after[:1])])
            keys, reads = keys * following.exp(), reads * before.exp()
        end = torch.einsum("thk,thv->hkv", keys, values)
        if not segment.through[segment.rank]:  # the last piece begins here
            end += transition * initial_state[-1]
        entering, transitions = scan(segment, transition, end)
    if segment.continues[segment.rank]:
        initial_state = torch.cat([entering[None], initial_state[1:]])
    output, states = run(initial_state)
    return carry(segment, output, states, reads, transitions, over_first)
