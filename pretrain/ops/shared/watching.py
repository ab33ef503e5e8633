"""What ops show of themselves to whoever watches a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.across import crossing, halo

Watch = Callable[[Mapping[str, Tensor]], None]
"""Is shown numbers by name, as by :meth:`pretrain.nn.mixers.Mixer.note`."""


def is_backward_pass() -> bool:
    """Return whether a backward pass is under way, in which a forward pass is computed again."""
    return torch._C._current_graph_task_id() != -1


@torch.no_grad()
def one_step_before(rows: Tensor, initial: Tensor, sequences: Sequences) -> Tensor:
    """Return for each token what ``rows`` ``[T, ...]`` has of the token before it.

    ``initial`` ``[N, ...]`` is what each sequence starts from. Where sequences lie on several
    ranks, all of them must call.
    """
    rows = rows.detach()
    before = torch.cat([rows[:1], rows[:-1]])
    begins = sequences.sizes > 0
    starts = sequences.cu_seqlens[:-1][begins].long()
    before[starts] = initial.detach()[begins].to(rows.dtype)
    segment = crossing(sequences)
    if segment is not None:
        entered, _ = halo(sequences, rows, 1)
        if segment.continues[segment.rank]:
            before[0] = entered[-1]
    return before
