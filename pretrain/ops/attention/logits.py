"""The largest logit of softmax attention, by tiles: no matrix of all pairs is made."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences, without_waiting
from pretrain.ops.shared.autocast import without_autocast

_TILE = 512  # queries, and keys, of which all pairs are looked at together


@without_autocast
@torch.no_grad()
def largest_logit(
    q: Tensor,
    k: Tensor,
    queries: Sequences,
    keys: Sequences,
    scale: float | None,
    window: int | None,
    tile: int = _TILE,
) -> Tensor:
    """Return the largest logit over heads and all pairs that attention sees, float32 or wider.

    q ``[T, H, D]``, k ``[S, Hkv, D]``; the other arguments are those of :func:`.attention`. Left
    out are queries one of whose logits is not finite; where none is left it is minus infinity.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = k.shape[1]
    largest = torch.full((), -torch.inf, dtype=dtype, device=q.device)
    on_host = _visible(queries, keys, window)
    first, last = (without_waiting(x, q.device) for x in on_host)
    for start in range(0, len(q), tile):
        stop = min(start + tile, len(q))
        # Queries side by side with those of the heads that share their keys: [Hkv, H / Hkv * t, D].
        rows = (q[start:stop].to(dtype) * scale).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
        found = torch.full(rows.shape[:-1], -torch.inf, dtype=dtype, device=q.device)
        # Both bounds only grow from query to query.
        begin, end = int(on_host[0][start]), int(on_host[1][stop - 1]) + 1
        for at in range(begin, end, tile):
            columns = k[at : min(at + tile, end)].to(dtype).permute(1, 2, 0)
            logits = (rows.flatten(1, 2) @ columns).unflatten(1, rows.shape[1:3])
            here = torch.arange(at, at + logits.shape[-1], device=q.device)
            if at < on_host[0][stop - 1] or at + len(here) - 1 > on_host[1][start]:
                low, high = (x[start:stop, None] for x in (first, last))
                logits = logits.masked_fill((here < low) | (here > high), -torch.inf)
            found = torch.maximum(found, logits.amax(-1))
        largest = torch.maximum(largest, torch.where(found.isfinite(), found, -torch.inf).amax())
    return largest


def _visible(queries: Sequences, keys: Sequences, window: int | None) -> tuple[Tensor, Tensor]:
    """Return the first and the last of the packed keys that each query sees, on the host."""
    asked, offered = (torch.tensor(s.lengths, dtype=torch.int64) for s in (queries, keys))
    owner = torch.repeat_interleave(torch.arange(len(asked)), asked)
    # A sequence's queries are its last tokens: they are counted from the end of its keys.
    ends = offered.cumsum(0)
    last = torch.arange(len(owner)) + (ends - asked.cumsum(0))[owner]
    first = (ends - offered)[owner]
    return (first if window is None else torch.maximum(first, last - window + 1)), last
