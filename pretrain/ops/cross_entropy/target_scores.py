"""Log-likelihoods of targets, and the likeliest ids, some tokens at a time."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.ops.cross_entropy.linear_cross_entropy import capped, local_targets


@torch.no_grad()
def target_scores(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tokens_at_once: int,
    candidates: int,
    group: dist.ProcessGroup | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the log-likelihoods of targets and the likeliest ids, ``[2, N]`` in float32 or wider.

    The first row is the log-likelihood of each target under ``softmax(f(x weight^T))``, f(l) =
    ``softcap tanh(l / softcap)`` where given; the second the likeliest of the first ``candidates``
    ids (the first of them at a tie), an integer.

    x ``[N, d]``; weight ``[V, d]``, this process's rows of a vocabulary sharded evenly over
    ``group`` (None: all of it); targets ``[N]`` int64. ``candidates`` excludes rows that pad the
    vocabulary, which no text has.
    """
    if group is not None and group.size() == 1:
        group = None
    first = 0 if group is None else group.rank() * len(weight)
    local = min(max(candidates - first, 0), len(weight))
    wide = torch.promote_types(x.dtype, torch.float32)
    found = torch.empty(2, len(x), dtype=wide, device=x.device)
    for start in range(0, len(x), tokens_at_once):
        part = slice(start, start + tokens_at_once)
        logits = capped((x[part] @ weight.t()).to(wide), softcap)
        column, inside = local_targets(targets[part], first, len(weight))
        wanted = logits.gather(1, column[:, None])[:, 0] * inside
        if local:
            best, index = logits[:, :local].max(-1)
        else:
            best, index = torch.full_like(wanted, -torch.inf), torch.zeros_like(targets[part])
        index = index + first
        largest = logits.amax(-1)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            everyones = best.clone()
            dist.all_reduce(everyones, op=dist.ReduceOp.MAX, group=group)
            index = torch.where(best == everyones, index, torch.iinfo(torch.int64).max)
            dist.all_reduce(index, op=dist.ReduceOp.MIN, group=group)
        sums = torch.stack([(logits - largest[:, None]).exp_().sum(-1), wanted])
        if group is not None:
            dist.all_reduce(sums, group=group)
        found[0, part] = sums[1] - largest - sums[0].log()
        found[1, part] = index.to(wide)
    return found
