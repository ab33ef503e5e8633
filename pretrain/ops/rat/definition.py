"""RAT's definition: a plain loop over tokens; and the attention that its fast form shares."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.attention.rotary import apply_rotary, rotary_embedding
from pretrain.ops.rat.state import RATState
from pretrain.ops.shared.arguments import sequence_rows
from pretrain.ops.shared.watching import Watch


def rotate(x: Tensor, chunks: Tensor, theta: float | None) -> Tensor:
    """Rotate x ``[R, H, D]`` by its chunk numbers ``[R]``; not at all where ``theta`` is None."""
    if theta is None:
        return x
    return apply_rotary(x, *rotary_embedding(chunks, x.shape[-1], theta))


def attend(
    q: Tensor,
    local: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    hidden: Tensor | None,
    watch: Watch | None = None,
) -> Tensor:
    """Attend from q to keys, and to the query's local key, which has value v.

    q, v ``[R, H, D]``, local ``[R, H]`` (q against its local key), keys and values ``[S, H, D]``;
    ``hidden`` ``[R, S]`` marks the keys that a query must not see. ``watch`` is shown all others'
    ``logits``.
    """
    logits = torch.einsum("rhd,shd->hrs", q, keys)
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    logits = torch.cat([logits, local.t()[..., None]], -1)
    if watch is not None:
        watch({"logits": logits.detach()})
    weights = logits.softmax(-1)
    mixed = torch.einsum("hrs,shd->rhd", weights[..., :-1], values)
    return mixed + weights[..., -1].t()[..., None] * v


def recurrent_rat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    state: RATState,
    sequences: Sequences,
    chunk_size: int,
    theta: float | None,
    watch: Watch | None = None,
) -> tuple[Tensor, RATState]:
    """Compute RAT by its definition, token by token.

    q (scaled), k, v, gate ``[T, H, D]`` of one dtype to the output ``[T, H, D]`` and the state.
    """
    old = (state.seen // chunk_size).tolist()
    outputs, keys, values = [], list(state.keys.split(old)), list(state.values.split(old))
    key, value = list(state.key), list(state.value)
    pairs = zip(sequence_rows(sequences), state.seen.tolist(), strict=True)
    for n, (tokens, seen) in enumerate(pairs):
        for i, t in enumerate(tokens):
            chunk, offset = divmod(seen + i, chunk_size)
            if offset == 0:
                key[n], value[n] = torch.zeros_like(key[n]), torch.zeros_like(value[n])
            key[n] = gate[t] * key[n] + (1 - gate[t]) * k[t]
            value[n] = gate[t] * value[n] + (1 - gate[t]) * v[t]
            at = torch.tensor([chunk], device=q.device)
            local = (q[t] * key[n]).sum(-1)
            rotated = rotate(q[t][None], at, theta)
            outputs.append(
                attend(rotated, local[None], keys[n], values[n], value[n][None], None, watch)
            )
            if offset == chunk_size - 1:
                keys[n] = torch.cat([keys[n], rotate(key[n][None], at, theta)])
                values[n] = torch.cat([values[n], value[n][None]])
    output = torch.cat(outputs) if outputs else torch.zeros_like(v)
    if not sequences.count:
        return output, state
    seen_now = state.seen + sequences.sizes
    return output, RATState(
        torch.cat(keys), torch.cat(values), torch.stack(key), torch.stack(value), seen_now
    )
