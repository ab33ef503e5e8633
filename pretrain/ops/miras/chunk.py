"""One chunk of tokens of a memory trained online, in closed form.

Within a chunk the gradient of every token is an outer product that does not depend on the other
tokens, so that A after each token is its start, decayed, plus a sum of those: with G the running
sum of log-decays, in the inputs of a matrix and s the derivative of the loss at its outputs,

    A_t = Diag(e^G_t) A - sum over i <= t of (e^(G_t - G_i) rate_i in_i)^T s_i

for a matrix whose inputs are the model's; decays and rates are on the side of the outputs where
those are. Reading it is linear attention, unless A has to be mapped to W element by element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.miras.rule import (
    Matrices,
    MirasRule,
    gelu_slope,
    normalized,
    normalized_backward,
    remember,
)


class Tokens(NamedTuple):
    """The tokens of a chunk, ``[n, H, C, dim]``, zeros at padding."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    rate: Tensor
    threshold: Tensor | None = None


def advance(
    rule: MirasRule, starts: Matrices, nows: Matrices, tokens: Tokens, ended: Tensor
) -> tuple[Tensor, Matrices, Matrices]:
    """Return the outputs ``[n, H, C, V]`` of a chunk, and starts and nows after it.

    starts: A where gradients are taken; nows: A before the first token, ``[n, H, in, out]`` for
    each matrix; ended ``[n]``: whether the chunk's last token ends it, so that W is made anew.
    """
    total = tokens.log_decay.cumsum(2)
    since = total[:, :, :, None] - total[:, :, None]  # [n, H, t, i, K]
    length = total.shape[2]
    future = torch.ones(length, length, dtype=torch.bool, device=total.device).triu(1)
    weights = since.masked_fill(future[..., None], -torch.inf).exp()
    ended = ended[:, None, None, None]
    x, ends = tokens.q, []
    for number, (inputs, slopes) in enumerate(_outer_products(rule, starts, tokens)):
        columns = number == 1
        left, right = (inputs, tokens.rate * slopes) if columns else (tokens.rate * inputs, slopes)
        read = _read_mapped if rule.elementwise else _read
        y, end = read(rule, nows[number], x, left, right, total, weights, columns)
        end = torch.where(ended, rule.kept(end), end)
        if rule.scales:
            before = rule.scale(starts[number])
            after = torch.where(ended, rule.scale(end), before)
            y = torch.cat([y[:, :, :-1] * before, y[:, :, -1:] * after], 2)
        ends.append(end)
        if columns:
            y = tokens.q + normalized(y)
        elif len(starts) == 2:
            y = F.gelu(y)
        x = y
    begun = tuple(torch.where(ended, b, a) for a, b in zip(starts, ends, strict=True))
    return x, begun, tuple(ends)


def _outer_products(
    rule: MirasRule, starts: Matrices, tokens: Tokens
) -> list[tuple[Tensor, Tensor]]:
    """Return for each matrix its inputs and the slopes at its outputs: its gradient's factors."""
    matrices = [rule.weights(a) for a in starts]
    if len(matrices) == 1:
        error = remember(matrices, tokens.k) - tokens.v
        return [(tokens.k, rule.slope(error, tokens.threshold))]
    first = tokens.k @ matrices[0]
    hidden = F.gelu(first)
    second = hidden @ matrices[1]
    error = tokens.k + normalized(second) - tokens.v
    slopes = normalized_backward(second, rule.slope(error, tokens.threshold))
    return [(tokens.k, (slopes @ matrices[1].mT) * gelu_slope(first)), (hidden, slopes)]


def _read(
    rule: MirasRule,
    now: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    total: Tensor,
    weights: Tensor,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    """Return what x ``[n, H, C, in]`` reads of each token's A, and A after the last."""
    to_end = (total[:, :, -1:] - total).exp()
    if columns:
        pairs = x @ left.mT
        added = torch.einsum("nhti,nhtiv->nhtv", pairs, weights * right[:, :, None])
        y = (x @ now) * total.exp() - added
        return y, now * total[:, :, -1:].exp() - left.mT @ (to_end * right)
    pairs = torch.einsum("nhtk,nhtik->nhti", x, weights * left[:, :, None])
    y = (x * total.exp()) @ now - pairs @ right
    return y, now * total[:, :, -1:].exp().mT - (to_end * left).mT @ right


def _read_mapped(
    rule: MirasRule,
    now: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    total: Tensor,
    weights: Tensor,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    """Return what x ``[n, H, C, in]`` reads of each token's W, and A after the last."""
    if columns:
        added = left.mT[:, :, None] @ (weights * right[:, :, None])  # [n, H, t, in, out]
        decays = total.exp()[:, :, :, None]
    else:
        added = (weights * left[:, :, None]).mT @ right[:, :, None]
        decays = total.exp()[..., None]
    a = decays * now[:, :, None] - added
    y = (x[:, :, :, None] @ rule.weights(a))[:, :, :, 0]
    return y, a[:, :, -1]
