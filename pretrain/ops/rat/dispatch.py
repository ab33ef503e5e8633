"""RAT (arXiv 2507.04416): a gated average inside chunks of L tokens, softmax attention across them.

    k~_t = g_t k~_{t-1} + (1 - g_t) k_t,  v~ likewise, from 0 at the start of every chunk

q_t attends to (k~, v~) at the end of every earlier chunk and to its own (k~_t, v~_t). Rotary
positions count chunks, so a token and its own k~ are at the same place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.sequences import chunk_layout, sequence_ids, token_positions
from pretrain.ops.attention.rotary import apply_rotary, rotary_embedding
from pretrain.ops.shared.arguments import (
    check_shapes,
    choose_backend,
    resolve_sequences,
    sequence_rows,
)

BACKENDS = ("auto", "recurrent", "chunked")


@dataclass
class RATState:
    """keys, values ``[S, H, D]``: what earlier chunks ended with, rotated, sequence after sequence;
    key, value ``[N, H, D]``: the averages so far in the open chunk; seen ``[N]``: tokens so far (of
    them seen // L chunks have ended)."""

    keys: Tensor
    values: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor


def rat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    chunk_size: int = 16,
    rope_theta: float | None = 10_000.0,
    scale: float | None = None,
    initial_state: RATState | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, RATState]:
    """q, k, v, gate ``[B, T, H, D]``, the gate in (0, 1); L is ``chunk_size``; ``scale`` defaults
    to D^-1/2. With ``cu_seqlens`` (``[N + 1]``) B must be 1 and N sequences are packed.

    backend: ``recurrent`` is the definition, token by token; ``chunked`` (and ``auto``) advances
    all chunks together. Returns the output in v's dtype and the state.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    backend = choose_backend("rat", backend, BACKENDS, "recurrent", "chunked")
    if v.ndim != 4:
        raise ValueError(f"rat: v is {tuple(v.shape)}, expected [B, T, H, D]")
    check_shapes("rat", {"q": (q, v.shape), "k": (k, v.shape), "gate": (gate, v.shape)})
    batch_size, length, num_heads, dim = v.shape
    if chunk_size < 1 or (rope_theta is not None and dim % 2):
        raise ValueError(
            f"rat: chunk_size is {chunk_size} and D {dim}, expected at least 1 and, with rotary "
            "positions, an even number"
        )
    cu_seqlens, lengths = resolve_sequences("rat", batch_size, length, cu_seqlens, v.device)
    dtype = torch.promote_types(v.dtype, torch.float32)
    state = initial_state
    if state is None:
        zeros = v.new_zeros(len(lengths), num_heads, dim, dtype=dtype)
        empty = zeros[:0]
        seen = torch.zeros(len(lengths), dtype=torch.int64, device=cu_seqlens.device)
        state = RATState(empty, empty, zeros, zeros, seen)
    elif state.seen.shape != (len(lengths),):
        raise ValueError(
            f"rat: initial_state is of {len(state.seen)} sequences, expected {len(lengths)}"
        )
    ends, running = int((state.seen // chunk_size).sum()), (len(lengths), num_heads, dim)
    check_shapes(
        "rat",
        {
            "initial_state.keys": (state.keys, (ends, num_heads, dim)),
            "initial_state.values": (state.values, (ends, num_heads, dim)),
            "initial_state.key": (state.key, running),
            "initial_state.value": (state.value, running),
        },
    )
    q, k, v_wide, gate = (x.flatten(0, 1).to(dtype) for x in (q, k, v, gate))
    q = q * (dim**-0.5 if scale is None else scale)
    run = _recurrent if backend == "recurrent" else _chunked
    output, state = run(q, k, v_wide, gate, state, cu_seqlens, chunk_size, rope_theta)
    return output.to(v.dtype).view(batch_size, length, num_heads, dim), state


def _rotate(x: Tensor, chunks: Tensor, theta: float | None) -> Tensor:
    """x ``[R, H, D]`` at chunk numbers ``[R]``."""
    if theta is None:
        return x
    return apply_rotary(x, *rotary_embedding(chunks, x.shape[-1], theta))


def _attend(
    q: Tensor, own: Tensor, keys: Tensor, values: Tensor, v: Tensor, hidden: Tensor | None
) -> Tensor:
    """q, v ``[R, H, D]``, own ``[R, H]`` (q against its own key), keys and values ``[S, H, D]``;
    ``hidden`` ``[R, S]`` marks the keys a query must not see."""
    logits = torch.einsum("rhd,shd->hrs", q, keys)
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    weights = torch.cat([logits, own.t()[..., None]], -1).softmax(-1)
    mixed = torch.einsum("hrs,shd->rhd", weights[..., :-1], values)
    return mixed + weights[..., -1].t()[..., None] * v


def _recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    state: RATState,
    cu_seqlens: Tensor,
    chunk_size: int,
    theta: float | None,
) -> tuple[Tensor, RATState]:
    lengths = cu_seqlens.diff().tolist()
    old = (state.seen // chunk_size).tolist()
    outputs, keys, values = [], list(state.keys.split(old)), list(state.values.split(old))
    key, value = list(state.key), list(state.value)
    pairs = zip(sequence_rows(lengths), state.seen.tolist(), strict=True)
    for n, (tokens, seen) in enumerate(pairs):
        for i, t in enumerate(tokens):
            chunk, place = divmod(seen + i, chunk_size)
            if place == 0:
                key[n], value[n] = torch.zeros_like(key[n]), torch.zeros_like(value[n])
            key[n] = gate[t] * key[n] + (1 - gate[t]) * k[t]
            value[n] = gate[t] * value[n] + (1 - gate[t]) * v[t]
            at = torch.tensor([chunk], device=q.device)
            own = (q[t] * key[n]).sum(-1)
            rotated = _rotate(q[t][None], at, theta)
            outputs.append(_attend(rotated, own[None], keys[n], values[n], value[n][None], None))
            if place == chunk_size - 1:
                keys[n] = torch.cat([keys[n], _rotate(key[n][None], at, theta)])
                values[n] = torch.cat([values[n], value[n][None]])
    output = torch.cat(outputs) if outputs else torch.zeros_like(v)
    if not lengths:
        return output, state
    seen_now = state.seen + cu_seqlens.diff()
    return output, RATState(
        torch.cat(keys), torch.cat(values), torch.stack(key), torch.stack(value), seen_now
    )


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    state: RATState,
    cu_seqlens: Tensor,
    chunk_size: int,
    theta: float | None,
) -> tuple[Tensor, RATState]:
    lengths = cu_seqlens.diff()
    phase, old = state.seen % chunk_size, state.seen // chunk_size
    ids = sequence_ids(cu_seqlens)
    # Each sequence is laid out behind as many empty places as its open chunk already has tokens.
    aligned = cu_seqlens
    if bool(phase.any()):
        aligned = torch.cat([cu_seqlens.new_zeros(1), (lengths + phase).cumsum(0)])
    layout = chunk_layout(aligned, chunk_size)
    place = aligned.long()[ids] + phase[ids] + token_positions(cu_seqlens)
    slot = layout.token_slot[place]
    num_chunks = len(layout.token_index)

    def lay(x: Tensor, empty: float) -> tuple[Tensor, ...]:
        full = x.new_full((num_chunks * chunk_size, *x.shape[1:]), empty)
        return full.index_copy(0, slot, x).unflatten(0, (num_chunks, chunk_size)).unbind(1)

    counts = [count for _, count in layout.steps]
    first = counts[0] if counts else 0
    key, value = v.new_zeros(2, num_chunks, *v.shape[1:])
    if bool(phase.any()):
        opened = (phase > 0)[layout.order[:first], None, None]
        key, value = (
            torch.cat([s[layout.order[:first]] * opened, z[first:]])
            for s, z in ((state.key, key), (state.value, value))
        )
    keys, values = [], []
    for g, k_t, v_t in zip(lay(gate, 1), lay(k, 0), lay(v, 0), strict=True):
        key, value = torch.lerp(k_t, key, g), torch.lerp(v_t, value, g)
        keys.append(key)
        values.append(value)
    key, value = (torch.stack(x, 1).flatten(0, 1)[slot] for x in (keys, values))  # [T, H, D]

    chunk = (state.seen[ids] + token_positions(cu_seqlens)) // chunk_size
    own = (q * key).sum(-1)
    q = _rotate(q, chunk, theta)
    ending = (state.seen[ids] + token_positions(cu_seqlens)) % chunk_size == chunk_size - 1
    new_keys, new_values = _rotate(key[ending], chunk[ending], theta), value[ending]
    now = state.seen + lengths
    parts = [lengths.tolist(), (now // chunk_size - old).tolist(), old.tolist()]
    outputs, all_keys, all_values = [], [], []
    pieces = zip(
        *(x.split(parts[0]) for x in (q, own, value, chunk)),
        *(x.split(parts[1]) for x in (new_keys, new_values)),
        *(x.split(parts[2]) for x in (state.keys, state.values)),
        strict=True,
    )
    for q_n, own_n, v_n, chunk_n, k_new, v_new, k_old, v_old in pieces:
        all_keys.append(torch.cat([k_old, k_new]))
        all_values.append(torch.cat([v_old, v_new]))
        if not len(q_n):
            continue
        visible = int(chunk_n[-1])
        earlier = torch.arange(visible, device=q.device)
        hidden = earlier[None, :] >= chunk_n[:, None]
        outputs.append(
            _attend(q_n, own_n, all_keys[-1][:visible], all_values[-1][:visible], v_n, hidden)
        )
    output = torch.cat(outputs) if outputs else torch.zeros_like(v)
    if not len(lengths):
        return output, state
    last = (cu_seqlens[1:].long() - 1).clamp_min(0)
    moved = (lengths > 0)[:, None, None]
    if len(v):
        key = torch.where(moved, key[last], state.key)
        value = torch.where(moved, value[last], state.value)
    else:
        key, value = state.key, state.value
    return output, RATState(torch.cat(all_keys), torch.cat(all_values), key, value, now)
