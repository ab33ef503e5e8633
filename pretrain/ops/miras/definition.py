"""The definition of a memory trained online: a plain loop that differentiates the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.miras.rule import Matrices, MirasRule, remember
from pretrain.ops.shared.arguments import sequence_rows


def recurrent_miras(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    threshold: Tensor | None,
    starts: Matrices,
    nows: Matrices,
    seen: Tensor,
    rule: MirasRule,
    sequences: Sequences,
    chunk_size: int,
) -> tuple[Tensor, Matrices, Matrices]:
    """Train and read a memory by its definition, one token after another.

    tokens: q, k ``[T, H, K]``, v ``[T, H, V]``, log_decay and rate ``[T, H, K]``; threshold None or
    ``[T, H, V]``; starts and nows: A at the open chunk's start and now, ``[N, H, in, out]`` for
    each matrix; seen ``[N]``; all but that of one dtype. Returns the output ``[T, H, V]``, and
    starts and nows after the last tokens.
    """
    q, k, v, log_decay, rate = (x.unbind(0) for x in tokens)
    limits = [None] * len(q) if threshold is None else threshold.unbind(0)
    outputs: list[Tensor] = []
    ends: list[tuple[list[Tensor], list[Tensor]]] = []
    for n, (rows, before) in enumerate(zip(sequence_rows(sequences), seen.tolist(), strict=True)):
        start, now = [a[n] for a in starts], [a[n] for a in nows]
        for i, t in enumerate(rows):
            gradients = _gradients(rule, [rule.weights(a) for a in start], k[t], v[t], limits[t])
            # Decays and rates are those of a matrix's side that the model sees.
            sides = [x.unsqueeze(axis) for x in (log_decay[t].exp(), rate[t]) for axis in (-1, -2)]
            pairs = zip(now, gradients, sides[:2], sides[2:], strict=False)
            now = [decay * a - eta * gradient for a, gradient, decay, eta in pairs]
            ended = (before + i + 1) % chunk_size == 0
            if ended:
                now = start = [rule.kept(a) for a in now]
            matrices = now
            if rule.scales:
                matrices = [a * rule.scale(b) for a, b in zip(now, start, strict=True)]
            elif rule.elementwise:
                matrices = [rule.weights(a) for a in now]
            outputs.append(remember(matrices, q[t][:, None])[:, 0])
        ends.append((start, now))
    output = torch.stack(outputs) if outputs else torch.zeros_like(tokens[2])
    if not ends:
        return output, starts, nows
    first, last = (
        tuple(torch.stack(parts) for parts in zip(*side, strict=True))
        for side in zip(*ends, strict=True)
    )
    return output, first, last


def _gradients(
    rule: MirasRule, matrices: list[Tensor], k: Tensor, v: Tensor, threshold: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the gradient of one token's loss with respect to each matrix."""
    with torch.inference_mode(False), torch.enable_grad():
        k, v = (x.clone() if x.is_inference() else x for x in (k, v))
        if threshold is not None and threshold.is_inference():
            threshold = threshold.clone()
        matrices = [w.clone() if w.is_inference() else w for w in matrices]
        matrices = [w if w.requires_grad else w.detach().requires_grad_() for w in matrices]
        error = remember(matrices, k[:, None])[:, 0] - v
        loss = rule.of_error(error, threshold)
        return torch.autograd.grad(loss, matrices, create_graph=True)
