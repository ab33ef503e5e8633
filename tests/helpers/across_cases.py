"""Ops as cases of tests that divide a row over ranks; see across_worker.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain.ops import (
    attention,
    delta_rule,
    diagonal_scan,
    dplr,
    linear_attention,
    log_sum_exp_gate,
    m2rnn,
    mesa,
    newton_recurrence,
    para_gru,
    para_lstm,
    rat,
    rnn,
    short_convolution,
)
from pretrain.ops.rnn.cells import CELLS


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


def of_scan(dtype=torch.float64, given=True, layouts=()):
    """The diagonal recurrence; complex numbers are given as pairs, and returned as such."""

    def made(x):
        return torch.complex(*x.unflatten(-1, (2, -1)).unbind(-2)) if dtype.is_complex else x

    def pairs(x):
        return torch.cat([x.real, x.imag], -1) if dtype.is_complex else x

    def run(tensors, parameters, states, sequences):
        a, x = map(made, tensors)
        y, end = diagonal_scan(
            a / (0.1 + a.abs()),
            x,
            sequences=sequences,
            initial_state=made(states[0]) if given else None,
        )
        return pairs(y), [pairs(end)]

    return Case(
        f"diagonal_scan {dtype} {given}",
        run,
        lambda g, total: [normal(g, 1, total, 6) for _ in range(2)],
        states=lambda g, n: [normal(g, n, 6)] if given else [],
        layouts=layouts,
    )


def of_low_rank(decay, given=True, backend="auto", layouts=(), one_key=False):
    """Diagonal plus low rank, with erase keys of unit norm, and a write key or the key for it."""
    base = of_matrix_state(dplr, decay, given=given, layouts=layouts, backend=backend)

    def tensors(g, total):
        found = base.tensors(g, total)
        keys = normal(g, 2, 1, total, 2, 6)
        erase, write = keys / keys.norm(dim=-1, keepdim=True)
        if one_key:
            return [found[0], write, found[2], -erase, *found[3:]]
        return [*found[:3], -erase, write, *found[3:]]

    return replace(base, tensors=tensors, name=f"{base.name} {one_key}")


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


def of_attention(heads, kv_heads, window=None, layouts=(), backend="auto"):
    def run(tensors, parameters, states, sequences):
        return attention(*tensors, window=window, sequences=sequences, backend=backend), []

    def tensors(g, total):
        return [normal(g, 1, total, n, 4) for n in (heads, kv_heads, kv_heads)]

    return Case(f"attention {heads} {kv_heads} {window} {backend}", run, tensors, layouts=layouts)


def of_cell(cell, heads=4, given=True, clip=None, layouts=()):
    kind, dim = CELLS[cell], 3

    def run(tensors, parameters, states, sequences):
        y, ends = rnn(
            *tensors,
            *parameters,
            cell=cell,
            state_grad_clip=clip,
            sequences=sequences,
            initial_state=(*states, *([1 + 0 * states[0]] * (kind.states[-1] == "m")))
            if states
            else None,
        )
        return y, ends[: len(ends) if given else None]

    def parameters(g):
        weight = 0.4 * normal(g, heads, dim, kind.gates, dim)
        return [weight, normal(g, kind.biases, heads, dim)]

    def states(g, n):
        count = len(kind.states) - (kind.states[-1] == "m")
        found = [normal(g, n, heads, dim) for _ in range(count)]
        return [*found[:2], *(x.abs() + 1 for x in found[2:])] if given else []

    return Case(
        f"{cell} {heads} {given} {clip}",
        run,
        lambda g, total: [normal(g, 1, total, kind.gates, heads, dim)],
        parameters,
        states,
        layouts,
    )


def of_log_sum_exp_gate(heads, given=True, layouts=()):
    def run(tensors, parameters, states, sequences):
        weight, log_decay, last = log_sum_exp_gate(
            *tensors, sequences=sequences, initial_state=states[0] if given else None, chunk_size=8
        )
        return torch.cat([weight, log_decay], -1), [last]

    return Case(
        f"log_sum_exp_gate {heads} {given}",
        run,
        lambda g, total: [normal(g, 1, total, heads, 3)],
        states=lambda g, n: [normal(g, n, heads, 3)] if given else [],
        layouts=layouts,
    )


def of_m2rnn(q_heads, k_heads, heads, given=True, clip=None):
    def run(tensors, parameters, states, sequences):
        q, k, v, forget = tensors
        y, end = m2rnn(
            q,
            k,
            v,
            parameters[0],
            forget.sigmoid(),
            state_grad_clip=clip,
            sequences=sequences,
            initial_state=states[0] if given else None,
        )
        return y, [end]

    def tensors(g, total):
        q, k = normal(g, 1, total, q_heads, 3), normal(g, 1, total, k_heads, 3)
        return [q, k, normal(g, 1, total, heads, 2), normal(g, 1, total, heads)]

    return Case(
        f"m2rnn {q_heads} {k_heads} {heads} {given} {clip}",
        run,
        tensors,
        lambda g: [0.5 * normal(g, heads, 2, 2)],
        lambda g, n: [normal(g, n, heads, 3, 2)] if given else [],
        () if heads == 4 and not clip else ("four", "short"),
    )


def of_mesa(heads, layouts=()):
    key_dim, value_dim = 3, 4

    def run(tensors, parameters, states, sequences):
        q, k, v, beta, decay = tensors
        covariance = states[0] @ states[0].mT
        y, ends = mesa(
            q,
            k,
            v,
            beta.sigmoid(),
            parameters[0].exp(),
            log_decay=-decay.exp(),
            initial_state=(covariance, states[1]),
            sequences=sequences,
        )
        return y, ends

    def tensors(g, total):
        return [normal(g, 1, total, heads, *dims) for dims in ((3,), (3,), (4,), (), ())]

    return Case(
        f"mesa {heads}",
        run,
        tensors,
        lambda g: [normal(g, heads, key_dim)],
        lambda g, n: [normal(g, n, heads, key_dim, dim) for dim in (key_dim, value_dim)],
        layouts,
    )


def of_rat(heads, chunk_size, layouts=()):
    def run(tensors, parameters, states, sequences):
        q, k, v, gate = tensors
        y, state = rat(q, k, v, gate.sigmoid(), chunk_size=chunk_size, sequences=sequences)
        return y, [state.key, state.value]

    return Case(
        f"rat {heads} {chunk_size}",
        run,
        lambda g, total: [normal(g, 1, total, heads, 4) for _ in range(4)],
        layouts=layouts,
    )


def of_para_rnn(op, given=True, gate=0.0, dim=5, layouts=(), **options):
    """ParaGRU or ParaLSTM, its memory gate's inputs shifted so that it keeps more."""
    rows, count = (3, 1) if op is para_gru else (5, 2)

    def run(tensors, parameters, states, sequences):
        shift = torch.zeros(3, 1, dtype=tensors[0].dtype)
        shift[0] = gate if op is para_lstm else -gate
        state = (states[0][:, 0] if op is para_gru else states[0]) if given else None
        weights = parameters[0].split([3, rows - 3]) if rows > 3 else parameters[:1]
        y, end = op(
            tensors[0] + shift,
            *weights,
            parameters[1],
            sequences=sequences,
            initial_state=state,
            tolerance=1e-13,
            **options,
        )
        return y, [end]

    return Case(
        f"{op.__name__} {given} {gate} {options.get('backend', '')}".strip(),
        run,
        lambda g, total: [normal(g, 1, total, 3, dim)],
        lambda g: [0.5 * normal(g, rows, dim).tanh(), normal(g, 3, dim)],
        lambda g, n: [0.5 * normal(g, n, count, dim)] if given else [],
        layouts,
    )


def of_newton():
    """A cell of two states whose derivatives are found by torch.func, and unbounded states."""

    def step(h, x, p):
        kept = torch.sigmoid(x[0] + p[0] * h[1])
        return torch.stack([kept * h[0] + x[1], torch.tanh(h[0] * p[1] + x[0])])

    def run(tensors, parameters, states, sequences):
        y, end = newton_recurrence(
            step,
            *tensors,
            *parameters,
            num_states=2,
            initial_state=states[0],
            sequences=sequences,
            tolerance=1e-13,
        )
        return y, [end]

    return Case(
        "newton_recurrence",
        run,
        lambda g, total: [normal(g, 1, total, 2, 3)],
        lambda g: [0.3 * normal(g, 2, 3)],
        lambda g, n: [normal(g, n, 2, 3)],
    )


SOME = ("four", "short")
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
    of_scan(),
    of_scan(torch.complex128, layouts=("one", "short")),
    of_scan(given=False, layouts=("four",)),
    of_low_rank("channel"),
    of_low_rank("head", given=False, layouts=("four",), one_key=True),
    convolution(4, True, True),
    convolution(2, False, False),
    convolution(60, False, True),
    *(of_attention(4, kv_heads) for kv_heads in (1, 2, 4)),
    *(of_attention(*heads, layouts=SOME) for heads in ((6, 3), (6, 2), (6, 1), (5, 5), (8, 2))),
    *(of_attention(4, 2, window) for window in (7, 60, 150)),
    of_attention(4, 2, 2, SOME),
    of_attention(4, 2, 60, SOME, "explicit"),
    *(of_attention(3, kv_heads) for kv_heads in (1, 3)),  # on 4: more ranks than heads
    of_attention(1, 1, layouts=SOME),
    of_cell("slstm"),
    *(of_cell(cell, layouts=SOME) for cell in ("elman", "gru", "lstm")),
    of_cell("lstm", 3, layouts=SOME),  # on 4: a rank without heads
    of_cell("gru", 5, False, layouts=SOME),
    of_cell("slstm", 4, False, layouts=SOME),
    of_cell("gru", clip=0.1, layouts=SOME),
    of_m2rnn(1, 1, 4),
    of_m2rnn(2, 4, 4, given=False),
    of_m2rnn(1, 3, 3),
    of_m2rnn(1, 5, 5, clip=0.1),
    of_log_sum_exp_gate(4),
    of_log_sum_exp_gate(3, given=False, layouts=SOME),
    of_mesa(4, SOME),
    of_rat(4, 5),
    of_rat(4, 16, SOME),
    of_rat(3, 5, SOME),
    of_rat(6, 16, SOME),
    *(of_para_rnn(op) for op in (para_gru, para_lstm)),
    *(of_para_rnn(op, False, 6.0, layouts=("one", "short")) for op in (para_gru, para_lstm)),
    of_para_rnn(para_lstm, backend="sequential", layouts=("four",)),
    of_newton(),
]
