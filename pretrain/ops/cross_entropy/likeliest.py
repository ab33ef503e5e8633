"""A model's likeliest ids of each token, some tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.teacher_top import TeacherTop
from pretrain.ops.cross_entropy.linear_cross_entropy import capped


@torch.no_grad()
def likeliest(
    x: Tensor,
    weight: Tensor,
    k: int,
    *,
    tokens_at_once: int,
    vocabulary: int,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TeacherTop:
    """Return the ``k`` likeliest of the first ``vocabulary`` ids under ``softmax(f(x weight^T))``.

    f(l) is ``softcap tanh(l / softcap)`` where that is given, and then a division by
    ``temperature``. x ``[N, d]``; weight ``[V, d]``, all of the vocabulary. Log-probabilities are
    in float32 or wider.
    """
    parts = []
    for piece in x.split(tokens_at_once):
        logits = (piece @ weight.t()).to(torch.promote_types(x.dtype, torch.float32))
        logits = capped(logits, softcap)[:, :vocabulary] / temperature
        log_probs = logits.log_softmax(-1)
        top, ids = log_probs.topk(min(k, vocabulary), -1)
        rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(-1)
        parts.append((ids, top, rest))
    return TeacherTop(*(torch.cat(each) for each in zip(*parts, strict=True)))
