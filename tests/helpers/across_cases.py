"""Ops as cases of tests that divide a row over ranks; see across_worker.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.ops import delta_rule, linear_attention, short_convolution


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass
class Case:
    """An op: what it takes and how it is called.

    Attributes:
        run: (tensors, parameters, states, sequences) to the output and the final states.
        tensors: A function of a generator and T, to tensors ``[1, T, ...]``.
        parameters: A function of a generator, to tensors that all ranks have.
        states: A function of a generator and N, to initial states ``[N, ...]``.
        layouts: Names of layouts, all by default.
    """

    name: str
    run: Callable[..., tuple[Tensor, Sequence[Tensor]]]
    tensors: Callable[..., list[Tensor]]
    parameters: Callable[..., list[Tensor]] = lambda generator: []
    states: Callable[..., list[Tensor]] = lambda generator, n: []
    layouts: Sequence[str] = ()


def of_matrix_state(op, decay, n=0, strength=0.3, given=True, key_dim=6, layouts=(), **options):
    """The linear family (n = 0) or the delta rule with n sub-steps."""
    heads, value_dim, steps = 2, 5, max(n, 1)

    def tensors(g, total):
        q, k = normal(g, 1, total, heads, key_dim), normal(g, 1, steps * total, heads, key_dim)
        v = normal(g, 1, steps * total, heads, value_dim)
        found = [q, k / k.norm(dim=-1, keepdim=True) if n else k, v]
        if n:
            found.append(2 * torch.rand(1, steps * total, heads, generator=g, dtype=q.dtype))
        if decay:
            shape = q.shape if decay == "channel" else q.shape[:3]
            found.append(-strength * torch.rand(shape, generator=g, dtype=q.dtype))
        return found

    def run(tensors, parameters, states, sequences):
        settings: dict[str, Any] = {"num_householder": n} if n else {}
        arguments = list(tensors)
        if decay:
            settings["log_decay"] = arguments.pop()
        if states:
            settings["initial_state"] = states[0]
        y, final = op(*arguments, sequences=sequences, chunk_size=8, **settings, **options)
        return y, [final]

    def states(g, count):
        return [normal(g, count, heads, key_dim, value_dim)] if given else []

    name = f"{op.__name__} {n} {decay} {strength} {given} {key_dim} {options.get('backend', '')}"
    return Case(name.strip(), run, tensors, states=states, layouts=layouts)


def convolution(width, bias, given):
    def run(tensors, parameters, states, sequences):
        y, final = short_convolution(
            *tensors,
            *parameters,
            activation="silu",
            sequences=sequences,
            initial_state=states[0] if states else None,
        )
        return y, [final]

    return Case(
        f"short_convolution {width} {bias} {given}",
        run,
        lambda g, total: [normal(g, 1, total, 6)],
        lambda g: [normal(g, 6, width), *([normal(g, 6)] if bias else [])],
        lambda g, n: [normal(g, n, width - 1, 6)] if given else [],
    )


CASES = [
    *(of_matrix_state(linear_attention, decay) for decay in (None, "head", "channel")),
    of_matrix_state(linear_attention, "channel", strength=60.0, layouts=("one", "short")),
    of_matrix_state(linear_attention, "head", given=False),
    of_matrix_state(linear_attention, "head", key_dim=1, layouts=("one", "four")),
    of_matrix_state(linear_attention, "head", backend="recurrent", layouts=("four",)),
    *(of_matrix_state(delta_rule, decay, n=1) for decay in (None, "head", "channel")),
    of_matrix_state(delta_rule, "head", n=2),
    of_matrix_state(delta_rule, "channel", n=2, given=False),
    of_matrix_state(delta_rule, "head", n=1, key_dim=1, layouts=("one", "four")),
    of_matrix_state(delta_rule, "channel", n=1, backend="recurrent", layouts=("four",)),
    convolution(4, True, True),
    convolution(2, False, False),
    convolution(60, False, True),
]
