"""Attention's definition: every weight written out."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Sequences,
    keys: Sequences,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Compute attention over all pairs of tokens, in float32 or wider.

    Pairs that are masked have weight 0. q ``[T, H, D]``, k, v ``[S, Hkv, D]``, output ``[T, H, D]``
    in q's dtype.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(groups, 1) for x in (k, v))
    position = queries.positions + (keys.sizes - queries.sizes)[queries.ids]
    distance = position[:, None] - keys.positions[None, :]
    seen = (queries.ids[:, None] == keys.ids[None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("thd,shd->hts", q.to(dtype), k) * scale
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).to(q.dtype)
