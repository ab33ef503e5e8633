"""RAT with all chunks of all sequences side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.rat.definition import attend, rotate
from pretrain.ops.rat.state import RATState
from pretrain.ops.shared.watching import Watch


def chunked_rat(
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
    """Compute RAT with all chunks side by side.

    Shapes are those of :func:`pretrain.ops.rat.definition.recurrent_rat`.
    """
    lengths, ids, positions = sequences.sizes, sequences.ids, sequences.positions
    phase, old = state.seen % chunk_size, state.seen // chunk_size
    # Each sequence is laid out after as many empty positions as its open chunk already has tokens.
    aligned = sequences
    if bool(phase.any()):
        aligned = Sequences.from_lengths((lengths + phase).tolist(), sequences.device)
    layout = aligned.chunk_layout(chunk_size)
    position = aligned.cu_seqlens.long()[ids] + phase[ids] + positions
    slot = layout.token_slot[position]
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

    chunk = (state.seen[ids] + positions) // chunk_size
    local = (q * key).sum(-1)
    q = rotate(q, chunk, theta)
    ending = (state.seen[ids] + positions) % chunk_size == chunk_size - 1
    new_keys, new_values = rotate(key[ending], chunk[ending], theta), value[ending]
    now = state.seen + lengths
    parts = [sequences.lengths, (now // chunk_size - old).tolist(), old.tolist()]
    outputs, all_keys, all_values = [], [], []
    pieces = zip(
        *(x.split(parts[0]) for x in (q, local, value, chunk)),
        *(x.split(parts[1]) for x in (new_keys, new_values)),
        *(x.split(parts[2]) for x in (state.keys, state.values)),
        strict=True,
    )
    for q_n, local_n, v_n, chunk_n, k_new, v_new, k_old, v_old in pieces:
        all_keys.append(torch.cat([k_old, k_new]))
        all_values.append(torch.cat([v_old, v_new]))
        if not len(q_n):
            continue
        visible = int(chunk_n[-1])
        earlier = torch.arange(visible, device=q.device)
        hidden = earlier[None, :] >= chunk_n[:, None]
        seen = all_keys[-1][:visible], all_values[-1][:visible]
        outputs.append(attend(q_n, local_n, *seen, v_n, hidden, watch))
    output = torch.cat(outputs) if outputs else torch.zeros_like(v)
    if not sequences.count:
        return output, state
    last = (sequences.cu_seqlens[1:].long() - 1).clamp_min(0)
    moved = (lengths > 0)[:, None, None]
    if len(v):
        key = torch.where(moved, key[last], state.key)
        value = torch.where(moved, value[last], state.value)
    else:
        key, value = state.key, state.value
    return output, RATState(torch.cat(all_keys), torch.cat(all_values), key, value, now)
