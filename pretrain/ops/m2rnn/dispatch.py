"""M2RNN: a non-linear recurrence over a matrix state (arXiv 2603.14360).

    Z_t = tanh(H_{t-1} W + k_t^T v_t);    H_t = f_t H_{t-1} + (1 - f_t) Z_t;    y_t = q_t H_t

W multiplies on the right; the rows of H (key channels) never meet except in the read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.ops.shared.arguments import (
    check_heads,
    check_shapes,
    check_triton,
    choose_backend,
    resolve_sequences,
    resolve_state,
    sequence_rows,
    triton_fits,
)
from pretrain.ops.shared.checkpointed_recurrence import (
    States,
    Steps,
    checkpointed_recurrence,
    previous_rows,
)

BACKENDS = ("auto", "recurrent", "checkpointed", "triton")


def m2rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    *,
    state_grad_clip: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    checkpoint_every: int | None = None,
) -> tuple[Tensor, Tensor]:
    """q ``[B, T, Hq, K]``, k ``[B, T, Hk, K]``, v ``[B, T, H, V]``, weight ``[H, V, V]``, forget
    ``[B, T, H]`` in (0, 1). Hq and Hk divide H; each of their heads serves consecutive ones of H.

    ``state_grad_clip`` bounds every element of the gradient carried from one step back to the step
    before (not the part that enters through y), as in the published runs. With ``cu_seqlens``
    (``[N + 1]``) B must be 1 and N sequences are packed; ``initial_state`` is ``[N, H, K, V]``.

    backend: ``recurrent`` is the definition, a plain loop through autograd; ``checkpointed`` the
    same loop with a backward pass of its own, which keeps the state of every
    ``checkpoint_every``-th step alone; ``triton`` the same in one kernel each way, q, k, v of one
    dtype, ``checkpoint_every`` a multiple of 4 (64 by default). ``auto`` takes ``triton`` on CUDA
    for V of at most 128 (float32: 64) and ``checkpointed`` elsewhere.

    Returns y ``[B, T, H, V]`` in v's dtype and the final state, float32 or wider.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    widest = 256 // v.element_size()  # a head's W must fit a multiprocessor, several times
    on_chip = triton_fits(v, 100 * 1024) and v.shape[-1] <= widest
    fast = "triton" if on_chip else "checkpointed"
    backend = choose_backend("m2rnn", backend, BACKENDS, "recurrent", fast)
    check_heads("m2rnn", q, v)
    check_heads("m2rnn", k, v, "k")
    batch_size, length, num_heads, value_dim = v.shape
    key_dim = q.shape[-1]
    check_shapes(
        "m2rnn",
        {
            "q": (q, (batch_size, length, q.shape[2], key_dim)),
            "k": (k, (batch_size, length, k.shape[2], key_dim)),
            "weight": (weight, (num_heads, value_dim, value_dim)),
            "forget": (forget, (batch_size, length, num_heads)),
        },
    )
    for name, shared in (("q", q), ("k", k)):
        if num_heads % shared.shape[2]:
            raise ValueError(
                f"m2rnn: {name} has {shared.shape[2]} heads, expected a divisor of v's {num_heads}"
            )
    if state_grad_clip is not None and state_grad_clip <= 0:
        raise ValueError(f"m2rnn: state_grad_clip is {state_grad_clip}, expected more than 0")
    cu_seqlens, lengths = resolve_sequences("m2rnn", batch_size, length, cu_seqlens, v.device)
    initial_state = resolve_state(
        "m2rnn",
        initial_state,
        (len(lengths), num_heads, key_dim, value_dim),
        v,
        "sequences, heads, key dim, value dim",
    )
    if backend == "triton":
        check_triton("m2rnn", v)
        from pretrain.ops.m2rnn.kernels import CHUNK, M2RNN, PIECE

        chunk = CHUNK if checkpoint_every is None else checkpoint_every
        if chunk < 1 or chunk % PIECE:
            raise ValueError(
                f"m2rnn: checkpoint_every is {chunk}, expected a multiple of {PIECE} for triton"
            )
        output, state = M2RNN.apply(
            q.flatten(0, 1).to(v.dtype),
            k.flatten(0, 1).to(v.dtype),
            v.flatten(0, 1),
            weight,
            forget.flatten(0, 1),
            initial_state,
            cu_seqlens,
            state_grad_clip,
            chunk,
            torch.is_grad_enabled(),
        )
        return output.view(v.shape), state
    dtype = initial_state.dtype
    rows = [x.flatten(0, 1).to(dtype) for x in (q, k, v, forget)]
    weight = weight.to(dtype)
    if backend == "recurrent":
        output, state = _recurrent(rows, weight, initial_state, lengths, state_grad_clip)
    else:
        output, (state,) = checkpointed_recurrence(
            _M2RNN(state_grad_clip), rows, [weight], [initial_state], cu_seqlens, checkpoint_every
        )
    return output.to(v.dtype).view(batch_size, length, num_heads, value_dim), state


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is clamped to +-limit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clamp(-ctx.limit, ctx.limit), None


def clip_gradient(x: Tensor, limit: float | None) -> Tensor:
    """``x``; on the way back its gradient is clamped to +-``limit``."""
    return x if limit is None else _ClipGradient.apply(x, limit)


def _recurrent(
    rows: Sequence[Tensor],
    weight: Tensor,
    initial_state: Tensor,
    lengths: list[int],
    state_grad_clip: float | None,
) -> tuple[Tensor, Tensor]:
    num_heads = weight.shape[0]
    q, k = (_expand(x, num_heads).unbind(0) for x in rows[:2])
    v, forget = (x.unbind(0) for x in rows[2:])
    outputs, states = [], []
    for tokens, state in zip(sequence_rows(lengths), initial_state, strict=True):
        for t in tokens:
            z = torch.tanh(state @ weight + k[t][:, :, None] * v[t][:, None, :])
            f = forget[t][:, None, None]
            state = f * state + (1 - f) * z
            outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
            state = clip_gradient(state, state_grad_clip)
        states.append(state)
    output = torch.stack(outputs) if outputs else rows[2].new_zeros(rows[2].shape)
    return output, torch.stack(states) if states else initial_state


def _expand(x: Tensor, num_heads: int) -> Tensor:
    """``[R, Hx, K]`` to ``[R, H, K]``."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def _gather_heads(gradient: Tensor, num_heads: int) -> Tensor:
    """The way back of :func:`_expand`."""
    if gradient.shape[1] == num_heads:
        return gradient
    return gradient.unflatten(1, (num_heads, -1)).sum(2)


class _M2RNN:
    """rows: q, k, v, forget; parameters: weight; state H ``[N, H, K, V]``."""

    def __init__(self, state_grad_clip: float | None):
        self._clip = state_grad_clip

    def _run(
        self,
        k: Tensor,
        v: Tensor,
        f: Tensor,
        weight: Tensor,
        state: Tensor,
        steps: Steps,
        z_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The starting states followed by every row's state, and the final states."""
        num_states = state.shape[0]
        history = state.new_empty(num_states + k.shape[0], *state.shape[1:])
        history[:num_states] = state
        final, previous = state.clone(), history[:num_states]
        k, v, f = k[..., None], v[:, :, None, :], f[..., None, None]
        for first, count in steps:
            if count < len(previous):  # these sequences are over
                final[count : len(previous)] = previous[count:]
                previous = previous[:count]
            rows = slice(first, first + count)
            if z_rows is None:
                z = previous @ weight
            else:
                z = torch.matmul(previous, weight, out=z_rows[rows])
            z.addcmul_(k[rows], v[rows]).tanh_()
            after = history[num_states + first : num_states + first + count]
            previous = torch.lerp(z, previous, f[rows], out=after)
        final[: len(previous)] = previous
        return history, final

    def forward(
        self, rows: Sequence[Tensor], parameters: Sequence[Tensor], states: States, steps: Steps
    ) -> tuple[Tensor, States]:
        q, k, v, f = rows
        (weight,), (state,) = parameters, states
        k = _expand(k, weight.shape[0])
        history, final = self._run(k, v, f, weight, state, steps, None)
        q = _expand(q, weight.shape[0])
        return (q[:, :, None] @ history[len(state) :])[:, :, 0], (final,)

    def backward(
        self,
        rows: Sequence[Tensor],
        parameters: Sequence[Tensor],
        states: States,
        steps: Steps,
        d_output: Tensor,
        d_states: States,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], States]:
        q_shared, k_shared, v, f = rows
        (weight,), (state,), (d_state,) = parameters, states, d_states
        num_heads, num_states = weight.shape[0], len(state)
        q, k = _expand(q_shared, num_heads), _expand(k_shared, num_heads)
        z = state.new_empty(k.shape[0], *state.shape[1:])
        history, _ = self._run(k, v, f, weight, state, steps, z)
        dq = (history[num_states:] @ d_output[..., None])[..., 0]
        previous = previous_rows(history, num_states, steps)

        # Three buffers as large as the block's states: the history; previous - Z, which becomes
        # what the forget gate's gradient sums; tanh's slope, which becomes the gradient before it.
        decay = f[..., None, None]
        difference = previous - z
        d_inner = z.square_().neg_().add_(1).mul_(1 - decay)
        q_column, d_row, back = q[..., None], d_output[:, :, None, :], weight.mT
        for first, count in reversed(steps):
            part = slice(first, first + count)
            carried = d_state[:count]
            if self._clip is not None:
                carried.clamp_(-self._clip, self._clip)
            d = torch.addcmul(carried, q_column[part], d_row[part])
            difference[part].mul_(d)
            torch.matmul(d_inner[part].mul_(d), back, out=carried)
            carried.addcmul_(d, decay[part])
        df = difference.sum((-1, -2))
        del z, difference
        dk = (d_inner @ v[..., None])[..., 0]
        dv = (k[:, :, None] @ d_inner)[:, :, 0]
        d_weight = torch.zeros_like(weight)
        for a, b in zip(previous.split(16), d_inner.split(16), strict=True):
            # A few rows at a time: each head's matrix needs its rows side by side, in a copy.
            a, b = (x.transpose(0, 1).flatten(1, 2) for x in (a, b))
            d_weight.baddbmm_(a.mT, b)
        d_rows = (
            _gather_heads(dq, q_shared.shape[1]),
            _gather_heads(dk, k_shared.shape[1]),
            dv,
            df,
        )
        return d_rows, (d_weight,), (d_state,)
