"""M2RNN step by step with an explicit backward pass that keeps few of the states.

States are kept transposed, ``[N, H, V, K]``. The heads that share a key or a query then lie
together as one matrix ``[V of them all, K]``: outer products, reads and their gradients need no
copy of what is shared, and the longer axis is the one that operations run along. What a step writes
stays in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.ops.shared.checkpointed_recurrence import Recurrence, States, Steps, previous_rows


class CheckpointedM2RNN(Recurrence):
    """M2RNN as a :class:`Recurrence` of blocks of time steps.

    rows: q, k, v, forget; parameters: weight; state H transposed, ``[N, H, V, K]``.
    """

    states_per_step = 2

    def __init__(self, state_grad_clip: float | None):
        self._clip = state_grad_clip
        self._memory: dict[str, Tensor] = {}

    def _buffer(self, name: str, rows: int, like: Tensor) -> Tensor:
        """Return uninitialised ``[rows, ...]`` in memory that blocks use one after another.

        Fresh memory costs a CPU more than what is computed in it.
        """
        if name not in self._memory or len(self._memory[name]) < rows:
            made = like.new_empty(rows, *like.shape[1:])
            self._memory = {**self._memory, name: made}  # not that of the object copied
        return self._memory[name][:rows]

    def _of_all(self, name: str, weight: Tensor, num_states: int) -> Tensor:
        """Return ``[N H, V, V]``, the weight of every sequence's heads, made once in a pass."""
        rows = num_states * len(weight)
        if name not in self._memory or len(self._memory[name]) < rows:
            self._memory = {**self._memory, name: weight.repeat(num_states, 1, 1)}
        return self._memory[name][:rows]

    @override
    def forward(
        self, rows: Sequence[Tensor], parameters: Sequence[Tensor], states: States, steps: Steps
    ) -> tuple[Tensor, States]:
        q, k, v, f = rows
        (weight,), state = parameters, states[0].clone()
        readers, counts = q.shape[1], [count for _, count in steps]
        # Twice W and k, as the sigmoid in advance() needs them.
        doubled = self._of_all("doubled", 2 * weight.mT, len(state))
        inputs = _Inputs(k, v, f, doubled, counts)
        output = v.new_empty(len(v) * readers, 1, v.shape[1] * v.shape[2] // readers)
        by_reader = [count * readers for count in counts]
        queries, outputs = q.flatten(0, 1)[:, None].split(by_reader), output.split(by_reader)
        z, running = self._buffer("z", len(state), state), -1
        for i, count in enumerate(counts):
            if count != running:  # the other sequences are over
                running, now = count, _Step.of(state[:count], k.shape[1])
                inner = _Step.of(z[:count], k.shape[1])
                read = _together(now.states, readers).flatten(0, 1).mT
            inputs.advance(i, now, inner, out=now.states)
            torch.bmm(queries[i], read, out=outputs[i])
        return output.view(v.shape), (state,)

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
        q, k, v, f = rows
        (weight,), (state,) = parameters, states
        readers, shared, num_states = q.shape[1], k.shape[1], len(state)
        counts = [count for _, count in steps]
        history = self._buffer("history", num_states + len(k), state)
        z = self._buffer("z", len(k), state)
        history[:num_states] = state
        doubled = self._of_all("doubled", 2 * weight.mT, num_states)
        inputs = _Inputs(k, v, f, doubled, counts)
        inner = _Step.of_all(z, shared, counts)
        after = _Step.of_all(history, shared, [num_states, *counts])
        for i, count in enumerate(counts):
            before = after[i]
            if count < len(before.states):
                before = _Step.of(before.states[:count], shared)
            inputs.advance(i, before, inner[i], out=after[i + 1].states)
        d_output = _columns(d_output, readers).mT
        dq = (d_output @ _together(history[num_states:], readers))[:, :, 0]
        previous = previous_rows(history, num_states, steps)

        # Every step's Z becomes the gradient of what is inside its tanh.
        d_state = d_states[0].contiguous()
        buffers = [self._buffer(name, num_states, state) for name in ("total", "rest")]
        weights = self._of_all("weights", weight, num_states)
        d_weights, df = torch.zeros_like(weights), torch.empty_like(f)
        by_step = zip(
            _Step.of_all(previous, shared, counts),
            inner,
            *(x.split(counts) for x in (df, d_output.mT, q[:, :, None])),
            inputs.forget,
            (1 - f)[..., None, None].split(counts),
            strict=True,
        )
        running = -1
        for before, z_step, df_step, dy, query, forget, write in reversed(list(by_step)):
            if len(df_step) != running:
                running = len(df_step)
                carried, d, x = (t[:running] for t in (d_state, *buffers))
                carried_by_query, d_by_query = (_together(t, readers) for t in (carried, d))
                carried_by_head = carried.flatten(0, 1)
                back, d_back = (t[: len(carried_by_head)] for t in (weights, d_weights))
            if self._clip is not None:
                carried.clamp_(-self._clip, self._clip)
            torch.addcmul(carried_by_query, dy, query, out=d_by_query)
            torch.sub(before.states, z_step.states, out=x)
            torch.sum(x.mul_(d), (-1, -2), out=df_step)
            torch.mul(d, write, out=x)
            torch.ops.aten.tanh_backward.grad_input(x, z_step.states, grad_input=z_step.states)
            torch.mul(d, forget, out=carried)
            torch.baddbmm(carried_by_head, back, z_step.by_head, out=carried_by_head)
            torch.baddbmm(d_back, before.by_head, z_step.by_head.mT, out=d_back)
        by_key = _together(z, shared)
        dk = (_columns(v, shared).mT @ by_key)[:, :, 0]
        dv = (k[:, :, None] @ by_key.mT).view(v.shape)
        d_weight = d_weights.view(num_states, *weight.shape).sum(0)
        return (dq, dk, dv, df), (d_weight,), (d_state,)


class _Step(NamedTuple):
    """Views of the states ``[n, H, V, K]`` of a step, made once where a step is short.

    Attributes:
        states: The states themselves.
        by_key: ``[n, Hk, H V / Hk, K]``, with the heads that share a key side by side.
        by_head: ``[n H, V, K]``.
    """

    states: Tensor
    by_key: Tensor
    by_head: Tensor

    @classmethod
    def of(cls, states: Tensor, shared: int) -> _Step:
        return cls(states, _together(states, shared), states.flatten(0, 1))

    @classmethod
    def of_all(cls, states: Tensor, shared: int, counts: list[int]) -> list[_Step]:
        """Return the views of every step of ``[R, H, V, K]``, of ``counts`` rows each."""
        heads = [count * states.shape[1] for count in counts]
        whole = cls.of(states, shared)
        return list(
            map(
                cls,
                states.split(counts),
                whole.by_key.split(counts),
                whole.by_head.split(heads),
            )
        )


class _Inputs:
    """What a block's steps read, cut by step."""

    def __init__(self, k: Tensor, v: Tensor, f: Tensor, doubled: Tensor, counts: list[int]):
        shared = k.shape[1]
        self._doubled = {count: doubled[: count * v.shape[1]] for count in counts}
        self._values, self._counts = _columns(v, shared).split(counts), counts
        self._keys = (2 * k)[:, :, None].split(counts)
        self.forget = f[..., None, None].split(counts)
        self._minus_one = k.new_tensor(-1.0)

    def advance(self, i: int, before: _Step, z: _Step, out: Tensor) -> None:
        """Make step ``i``: fill ``z``, and ``out``, which may be the states before.

        tanh(x) is 2 sigmoid(2 x) - 1: a CPU takes six times as long for torch's tanh, and the error
        of that difference is a rounding of numbers up to 1.
        """
        torch.mul(self._values[i], self._keys[i], out=z.by_key)
        weights = self._doubled[self._counts[i]]
        torch.baddbmm(z.by_head, weights, before.by_head, out=z.by_head).sigmoid_()
        torch.add(self._minus_one, z.states, alpha=2, out=z.states)
        torch.lerp(z.states, before.states, self.forget[i], out=out)


def _together(states: Tensor, heads: int) -> Tensor:
    """View ``[R, H, V, K]`` as ``[R, heads, H V / heads, K]``: all that share a key or a query."""
    rows, number, width, keys = states.shape
    return states.view(rows, heads, number * width // heads, keys)


def _columns(values: Tensor, heads: int) -> Tensor:
    """View ``[R, H, V]`` as the columns ``[R, heads, H V / heads, 1]``, as :func:`_together`."""
    rows, number, width = values.shape
    return values.reshape(rows, heads, number * width // heads, 1)
