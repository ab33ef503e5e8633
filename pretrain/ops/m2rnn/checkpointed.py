"""M2RNN step by step with an explicit backward pass that keeps few of the states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.ops.m2rnn.definition import expand_heads
from pretrain.ops.shared.checkpointed_recurrence import Recurrence, States, Steps, previous_rows


def _gather_heads(gradient: Tensor, num_heads: int) -> Tensor:
    """Sum a gradient over the heads that share one, the way back of :func:`expand_heads`."""
    if gradient.shape[1] == num_heads:
        return gradient
    return gradient.unflatten(1, (num_heads, -1)).sum(2)


class CheckpointedM2RNN(Recurrence):
    """M2RNN as a :class:`Recurrence` of blocks of time steps.

    rows: q, k, v, forget; parameters: weight; state H ``[N, H, K, V]``.
    """

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
        """Return the starting states followed by every row's state, and the final states."""
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

    @override
    def forward(
        self, rows: Sequence[Tensor], parameters: Sequence[Tensor], states: States, steps: Steps
    ) -> tuple[Tensor, States]:
        q, k, v, f = rows
        (weight,), (state,) = parameters, states
        k = expand_heads(k, weight.shape[0])
        history, final = self._run(k, v, f, weight, state, steps, None)
        q = expand_heads(q, weight.shape[0])
        return (q[:, :, None] @ history[len(state) :])[:, :, 0], (final,)

    @override
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
        q, k = expand_heads(q_shared, num_heads), expand_heads(k_shared, num_heads)
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
