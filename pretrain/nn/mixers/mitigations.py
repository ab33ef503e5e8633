"""Settings of recurrent states at inference, without training (Stuffed Mamba, arXiv 2410.07145).

A state that was trained on short texts may collapse in long ones, because it never learned to
forget. It can be made to: by stronger decays and weaker writes, by a limit on its norm, or by a
window, whose state is the whole one less what is older:

    S_t^(r) = S_t - (a_t ... a_{t-r+1}) S_{t-r}

Mixers run their recurrence by :func:`recur`, which knows all of this, and name in ``mitigable``
what has a meaning for them. Training never sets any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.chunk_decay import bounded
from pretrain.ops.shared.histories import after_histories

if TYPE_CHECKING:
    from pretrain.nn.mixers.base import Mixer, State

Op = Callable[..., tuple[Tensor, Tensor]]
ALL = ("decay_scale", "write_scale", "norm_limit", "window")
DELTA_RULE = (
    "decay_scale",
    "write_scale",
    "norm_limit",
)  # a window would need a product of matrices


@dataclass(frozen=True)
class Mitigations:
    """What is done to recurrent states at inference; the defaults change nothing.

    Attributes:
        decay_scale: What log-decays are multiplied by; above 1 states forget more.
        write_scale: What is written is multiplied by it; below 1 less is inserted.
        norm_limit: The most that a head's state may have as Frobenius norm, one number or ``[H]``;
            a larger one is scaled down to it.
        norm_every: After how many tokens of a text it is, each time.
        window: The tokens that a state holds, the last ones.
    """

    decay_scale: float = 1.0
    write_scale: float = 1.0
    norm_limit: float | Tensor | None = None
    norm_every: int = 1
    window: int | None = None

    def changed(self) -> dict[str, Any]:
        """Return the settings, of ``ALL``, that change something."""
        values = {name: getattr(self, name) for name in ALL}
        return {
            name: value
            for name, value in values.items()
            if value is not None and not (name.endswith("scale") and value == 1)
        }


def recur(
    mixer: Mixer,
    op: Op,
    *inputs: Tensor,
    state: State | None,
    new_state: State,
    log_decay: Tensor | None = None,
    sequences: Sequences | None = None,
    gates_scaled: bool = False,
    **options: Any,
) -> Tensor:
    """Run ``op`` over the state ``recurrent`` as ``mixer.mitigations`` say, and return its output.

    ``inputs`` are q, k and v, and the gain beta of delta rules; the last of them is what
    ``write_scale`` scales. ``gates_scaled``: decays and writes were scaled before. What is carried
    on goes into ``new_state``.
    """
    if not gates_scaled:
        mixer.note(log_decay=log_decay)
    wanted = mixer.mitigations
    initial = None if state is None else state["recurrent"]
    if wanted is not None and not gates_scaled:
        if wanted.decay_scale != 1 and log_decay is not None:
            log_decay = log_decay * wanted.decay_scale
        if wanted.write_scale != 1:
            inputs = (*inputs[:-1], inputs[-1] * wanted.write_scale)
    run = partial(op, **options)
    if wanted is not None and wanted.norm_limit is not None:
        return _limited(run, wanted, inputs, log_decay, sequences, state, new_state)
    if wanted is not None and wanted.window is not None:
        return _windowed(run, wanted.window, inputs, log_decay, sequences, state, new_state)
    y, new_state["recurrent"] = run(
        *inputs, log_decay=log_decay, sequences=sequences, initial_state=initial
    )
    return y


def limited(states: Tensor, limit: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return states ``[N, H, K, V]`` of at most ``limit``, and the factors ``[N, H]`` for it."""
    norms = torch.linalg.vector_norm(states, dim=(-2, -1))
    factors = (torch.as_tensor(limit, dtype=norms.dtype, device=norms.device) / norms).clamp_max(1)
    return states * factors[..., None, None], factors


def held(state: State) -> State:
    """Return a mixer's state with what its recurrence reads alone: of a window, the last tokens."""
    if "window_recurrent" not in state:
        return state
    rest = {key: value for key, value in state.items() if not key.startswith("window_")}
    older = state["window_recurrent"]
    if "window_g" in state:
        decay = state["window_g"].double().sum(1).exp().to(older.dtype)
        older = older * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
    return {**rest, "recurrent": rest["recurrent"] - older}


def _limited(
    run: Op,
    wanted: Mitigations,
    inputs: tuple[Tensor, ...],
    log_decay: Tensor | None,
    sequences: Sequences | None,
    state: State | None,
    new_state: State,
) -> Tensor:
    """Run piece by piece, and limit the state where a piece is whole.

    Pieces are of a text, however it is cut: the state counts the tokens since the last limit.
    """
    shape, every, limit = inputs[0].shape[:2], wanted.norm_every, wanted.norm_limit
    assert limit is not None
    flat, sequences, log_decay = _in_a_row(inputs, sequences, log_decay)
    count, device = sequences.count, flat[0].device
    if state is None:
        since, found = [0] * count, None
    else:
        since = state["since_limit"].tolist() if "since_limit" in state else [0] * count
        found = state["recurrent"].clone()
    starts, y = [0], None
    for length in sequences.lengths:
        starts.append(starts[-1] + length)
    done = list(starts[:-1])
    while True:
        some = [n for n in range(count) if done[n] < starts[n + 1]]
        if y is not None and not some:
            break
        sizes = [min(every - since[n], starts[n + 1] - done[n]) for n in some]
        tokens = [
            t for n, size in zip(some, sizes, strict=True) for t in range(done[n], done[n] + size)
        ]
        at = torch.tensor(tokens, dtype=torch.int64, device=device)
        rows = torch.tensor(some, dtype=torch.int64, device=device)
        part, ends = run(
            *(_tokens_of(x, at, shape) for x in flat),
            log_decay=None if log_decay is None else log_decay[:, at],
            sequences=Sequences.from_lengths(sizes, device),
            initial_state=None if found is None else found[rows],
        )
        if found is None:
            found = ends.new_zeros(count, *ends.shape[1:])
        if y is None:
            y = part.new_zeros(1, sequences.num_tokens, *part.shape[2:])
        y[:, at] = part
        whole = [
            i
            for i, (n, size) in enumerate(zip(some, sizes, strict=True))
            if since[n] + size == every
        ]
        for n, size in zip(some, sizes, strict=True):
            done[n], since[n] = done[n] + size, (since[n] + size) % every
        if whole:
            picked = torch.tensor(whole, device=device)
            ends[picked], factors = limited(ends[picked], limit)
            last = torch.tensor([done[some[i]] - 1 for i in whole], device=device)
            y[0, last] *= factors[..., None].to(y.dtype)  # the output reads the limited state
        found[rows] = ends
    assert found is not None
    new_state["recurrent"] = found
    new_state["since_limit"] = torch.tensor(since, dtype=torch.int64, device=device)
    return y.view(*shape, *y.shape[2:])


def _windowed(
    run: Op,
    window: int,
    inputs: tuple[Tensor, ...],
    log_decay: Tensor | None,
    sequences: Sequences | None,
    state: State | None,
    new_state: State,
) -> Tensor:
    """Subtract what a second run, ``window`` tokens behind, makes of the same queries.

    The state is that of both runs, and the tokens between them.
    """
    shape, dtype = inputs[0].shape[:2], inputs[0].dtype
    (q, k, v), sequences, log_decay = _in_a_row(inputs, sequences, log_decay)
    wide = torch.promote_types(dtype, torch.float32)
    q = q.to(wide)  # the difference of two rounded numbers would be too inexact
    gather, tokens, ends = sequences.derive(after_histories, window)
    between = {"k": k, "v": v} if log_decay is None else {"k": k, "v": v, "g": bounded(log_decay)}
    earlier: dict[str, Tensor] = {}
    for name, x in between.items():
        key = f"window_{name}"
        if state is not None and key in state:
            past = state[key].to(x.dtype)
        else:  # tokens that wrote nothing
            past = x.new_zeros(sequences.count, window, *x.shape[2:])
        extended = torch.cat([past.flatten(0, 1), x[0]]).index_select(0, gather)
        new_state[key] = extended[ends]
        earlier[name] = extended[tokens][None]
        if name == "g":
            so_far = extended.double().cumsum(0)
            over = (so_far[tokens + window] - so_far[tokens]).exp().to(wide)[None]
    y, new_state["recurrent"] = run(
        q,
        k,
        v,
        log_decay=log_decay,
        sequences=sequences,
        initial_state=None if state is None else state["recurrent"],
    )
    if log_decay is not None:
        q = q * (over if over.ndim == 4 else over[..., None])
    old, new_state["window_recurrent"] = run(
        q,
        earlier["k"],
        earlier["v"],
        log_decay=earlier.get("g"),
        sequences=sequences,
        initial_state=None if state is None else state.get("window_recurrent"),
    )
    return (y - old).to(dtype).view(*shape, *y.shape[2:])


def _in_a_row(
    inputs: tuple[Tensor, ...], sequences: Sequences | None, log_decay: Tensor | None
) -> tuple[tuple[Tensor, ...], Sequences, Tensor | None]:
    """Return the inputs in one row, with the sequences that its parts are."""
    if sequences is not None:
        return inputs, sequences, log_decay
    batch_size, length = inputs[0].shape[:2]
    rows = Sequences.of_rows(batch_size, length, inputs[0].device)
    flat = tuple(x.flatten(0, 1)[None] for x in inputs)
    return flat, rows, None if log_decay is None else log_decay.flatten(0, 1)[None]


def _tokens_of(x: Tensor, at: Tensor, shape: torch.Size) -> Tensor:
    """Return some tokens of x ``[1, n T, ...]``, each with its n steps."""
    steps = x.shape[1] // max(shape[0] * shape[1], 1) or 1
    return x.unflatten(1, (-1, steps))[:, at].flatten(1, 2)
