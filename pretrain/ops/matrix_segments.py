"""Matrix states over a row that is divided over ranks: a scan of the segments' states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.data.sequences import Segment, Sequences, pieces_alone
from pretrain.ops.across import carry, scan

Run = Callable[..., tuple[Tensor, Tensor]]


def by_columns(
    run: Run,
    tensors: tuple[Tensor | None, ...],
    log_decay: Tensor | None,
    initial_state: Tensor,
    sequences: Sequences,
    segment: Segment,
    substeps: int = 1,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence on a segment, from the state that enters it.

    ``run(*tensors, log_decay=, initial_state=, sequences=)`` is the op, ``tensors`` begin with q, k
    and v, all but q with ``substeps`` steps for each token. What the segment makes of a state is
    found by the op itself: columns of the state never mix, so that K more of them, with values 0
    and from the identity, end as the transition.
    """
    q, _, v = tensors[:3]
    assert q is not None
    assert v is not None
    pieces, key_dim, value_dim = pieces_alone(sequences), q.shape[-1], v.shape[-1]
    with torch.no_grad():
        first = sequences.lengths[0]
        # Pieces in the middle neither get nor leave anything.
        outer, tokens = pieces, None
        if sequences.count > 2:
            outer = sequences.derive(_outer_pieces)
            tokens = sequences.derive(_outer_tokens)

        def part(x: Tensor | None, steps: int = 1) -> Tensor | None:
            if tokens is None or x is None:
                return x
            return x.unflatten(1, (-1, steps)).index_select(1, tokens).flatten(1, 2)

        k, values, *others = (part(x, substeps) for x in tensors[1:])
        assert values is not None
        wide = torch.cat([values, values.new_zeros(*values.shape[:3], key_dim)], -1)
        start = initial_state.new_zeros(outer.count, q.shape[2], key_dim, value_dim + key_dim)
        if not segment.through[segment.rank]:  # the last piece begins here
            start[-1, ..., :value_dim] = initial_state[-1]
        start[..., value_dim:] = torch.eye(key_dim, dtype=start.dtype, device=start.device)
        output, ends = run(
            part(q),
            k,
            wide,
            *others,
            log_decay=part(log_decay),
            initial_state=start,
            sequences=outer,
        )
        reads = output[0, :first, :, value_dim:].contiguous()
        end, transition = ends[-1, ..., :value_dim], ends[-1, ..., value_dim:]
        over_first = ends[0, ..., value_dim:].clone()
        entering, transitions = scan(segment, transition, end)
    if segment.continues[segment.rank]:
        initial_state = torch.cat([entering[None], initial_state[1:]])
    output, states = run(
        *tensors, log_decay=log_decay, initial_state=initial_state, sequences=pieces
    )
    return carry(segment, output, states, reads, transitions, over_first)


def _outer_pieces(sequences: Sequences) -> Sequences:
    first, last = sequences.lengths[0], sequences.lengths[-1]
    return Sequences.from_lengths([first, last], sequences.device)


def _outer_tokens(sequences: Sequences) -> Tensor:
    """Return the indices of the tokens of the first and the last piece."""
    first, last, total = sequences.lengths[0], sequences.lengths[-1], sequences.num_tokens
    tokens = torch.arange(total, device=sequences.device)
    return torch.cat([tokens[:first], tokens[total - last :]])
