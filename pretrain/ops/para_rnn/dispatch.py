"""ParaGRU and ParaLSTM: gated cells with diagonal recurrent weights (ParaRNN, arXiv 2510.21450).

para_gru    z = sigmoid(a_z h + u_z), r = sigmoid(a_r h + u_r), c = tanh(a_c r h + u_c),
            h' = (1 - z) h + z c
para_lstm   f = sigmoid(a_f h + c_f s + u_f), z = tanh(a_z h + u_z), s' = f s + (1 - f) z,
            o = sigmoid(a_o h + c_o s' + u_o), h' = o tanh(s')           (s: the cell state)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.ops.newton.dispatch import (
    ElementwiseCell,
    Linear,
    NewtonReport,
    check_iterations,
    default_tolerance,
    elementwise_recurrence,
)
from pretrain.ops.shared.arguments import (
    check_shapes,
    check_triton,
    choose_backend,
    resolve_sequences,
    resolve_state,
    triton_fits,
)

BACKENDS = ("auto", "sequential", "newton", "triton", "triton_newton", "triton_steps")


def para_gru(
    u: Tensor,
    a: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    iterations: int = 10,
    tolerance: float | None = None,
    fallback: bool = True,
    report: NewtonReport | None = None,
) -> tuple[Tensor, Tensor]:
    """u ``[B, T, 3, D]``: pre-activations of z, r, c; a ``[3, D]``: their recurrent weights; bias
    ``[3, D]``: added to u in float32 or wider.

    With ``cu_seqlens`` (``[N + 1]``) B must be 1 and N sequences are packed; ``initial_state`` is
    ``[N, D]``.

    backend: ``sequential`` is the definition, a plain loop; ``newton`` solves for all steps at
    once; ``triton_newton`` does so in one kernel, ``triton_steps`` walks through time in one, and
    both have the same kernel for the way back; ``triton`` is the former for few channels (of all
    sequences together) and the latter for many. ``auto`` takes ``triton`` on CUDA and ``newton``
    elsewhere, ``sequential`` where every sequence is a single token. Newton steps are made until a
    sequence's residual is at most ``tolerance`` (default 1e-5, in float64 1e-11), usually 3 (in
    float64 4). One that is not there after ``iterations`` is computed step by step instead (of
    ``triton_newton``: its stretches of time that are not there), and ``report`` counts it; without
    ``fallback`` it stays as it is then.

    Returns h of all steps ``[B, T, D]`` in u's dtype and the last, float32 or wider.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    weights = {"a": (a, 3)}
    state = None if initial_state is None else initial_state[:, None]
    output, final = _para_rnn(
        "para_gru",
        _ParaGRU(),
        u,
        weights,
        bias,
        state,
        cu_seqlens,
        backend,
        iterations,
        tolerance,
        fallback,
        report,
    )
    return output, final[:, 0]


def para_lstm(
    u: Tensor,
    a: Tensor,
    c: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    iterations: int = 10,
    tolerance: float | None = None,
    fallback: bool = True,
    report: NewtonReport | None = None,
) -> tuple[Tensor, Tensor]:
    """u ``[B, T, 3, D]``: pre-activations of f, o, z; a ``[3, D]``: their recurrent weights; c
    ``[2, D]``: the peepholes of f and o. States are ``[N, 2, D]``: cell state, then h. All else as
    in :func:`para_gru`, and so is the output."""
    weights = {"a": (a, 3), "c": (c, 2)}
    return _para_rnn(
        "para_lstm",
        _ParaLSTM(),
        u,
        weights,
        bias,
        initial_state,
        cu_seqlens,
        backend,
        iterations,
        tolerance,
        fallback,
        report,
    )


def _para_rnn(
    op: str,
    cell: ElementwiseCell,
    u: Tensor,
    weights: dict[str, tuple[Tensor, int]],
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
    iterations: int,
    tolerance: float | None,
    fallback: bool,
    report: NewtonReport | None,
) -> tuple[Tensor, Tensor]:
    """The output ``[B, T, D]`` and the states ``[N, S, D]``."""
    dim = u.shape[-1]
    check_shapes(
        op,
        {
            "u": (u, (*u.shape[:2], 3, dim)),
            "bias": (bias, (3, dim)),
            **{name: (tensor, (rows, dim)) for name, (tensor, rows) in weights.items()},
        },
    )
    wide = torch.promote_types(u.dtype, torch.float32)
    parameters = torch.cat([tensor.to(wide) for tensor, _ in weights.values()])
    if backend == "auto" and triton_fits(u):
        _, lengths = resolve_sequences(op, u.shape[0], u.shape[1], cu_seqlens, u.device)
        fast = "triton" if max(lengths, default=0) > 1 else "sequential"
        backend = choose_backend(op, backend, BACKENDS, "sequential", fast)
    if not backend.startswith("triton"):
        choose_backend(op, backend, BACKENDS, "sequential", "newton")
        states, final = elementwise_recurrence(
            op,
            cell,
            u if bias is None else u.to(wide) + bias.to(wide),
            parameters,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            backend=backend,
            iterations=iterations,
            tolerance=tolerance,
            fallback=fallback,
            report=report,
        )
        return states[:, :, -1].to(u.dtype), final

    choose_backend(op, backend, BACKENDS, "sequential", "triton")
    check_triton(op, u)
    from pretrain.ops.para_rnn.kernels import WIDE, ParaRNN

    check_iterations(op, iterations)
    cu_seqlens, lengths = resolve_sequences(op, u.shape[0], u.shape[1], cu_seqlens, u.device)
    initial_state = resolve_state(
        op, initial_state, (len(lengths), cell.num_states, dim), u, "sequences, states, channels"
    )
    bias = parameters.new_zeros(3, dim) if bias is None else bias.to(wide)
    output, final, residuals, failures, steps = ParaRNN.apply(
        op,
        u.flatten(0, 1),
        torch.cat([parameters, bias]),
        initial_state,
        cu_seqlens,
        iterations,
        default_tolerance(wide) if tolerance is None else tolerance,
        fallback,
        len(lengths) * dim >= WIDE if backend == "triton" else backend == "triton_steps",
    )
    if report is not None and lengths and not u.is_meta:
        report.add(residuals.amax(), failures.amax(1).sum(), len(lengths), steps.amax())
    return output.view(*u.shape[:2], dim), final


def _over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """sum of ``a b`` over all axes but the last (and the first, where ``a`` has one more)."""
    return (a * b).flatten(-3, -2).sum(-2)


class _ParaGRU(ElementwiseCell):
    """Parameters a_z, a_r, a_c."""

    bounded = True

    def __init__(self) -> None:
        super().__init__(self._step)

    @staticmethod
    def _gates(h: Tensor, u: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (2, *[1] * (u.ndim - 2), u.shape[-1])
        z, r = torch.addcmul(u[:2], a[:2].view(shape), h).sigmoid().unbind(0)
        return z, r, torch.addcmul(u[2], a[2], r * h[0]).tanh()

    @staticmethod
    def _step(h: Tensor, u: Tensor, a: Tensor) -> Tensor:
        z, _, c = _ParaGRU._gates(h, u, a)
        return torch.lerp(h[0], c, z)[None]

    def linearize(self, h: Tensor, x: Tensor, parameters: Tensor) -> Linear:
        (a_z, a_r, a_c), state = parameters, h[0]
        z, r, c = self._gates(h, x, parameters)
        squared = c * c
        to_c = torch.addcmul(z, z, squared, value=-1)  # dh'/d(pre-activation of c)
        difference = c.sub_(state)
        value = torch.addcmul(state, z, difference)
        jacobian = 1 - z
        to_z = difference.mul_(z).mul_(jacobian)
        to_r = torch.addcmul(r, r, r, value=-1).mul_(state).mul_(a_c)  # of c's by r's
        through = (r * a_c).addcmul_(to_r, a_r).mul_(to_c)
        jacobian.addcmul_(to_z, a_z).add_(through)
        return value[None], jacobian[None, None], (state, r, to_z, to_r, to_c)

    def vjp(self, known: Any, parameters: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        state, r, to_z, to_r, to_c = known
        cotangent = cotangent[0]
        d_u = cotangent.new_empty(3, *cotangent.shape)
        torch.mul(cotangent, to_z, out=d_u[0])
        torch.mul(cotangent, to_c, out=d_u[2])
        torch.mul(d_u[2], to_r, out=d_u[1])
        through = d_u[2] * r
        d_a = torch.stack(
            [_over_tokens(d_u[0], state), _over_tokens(d_u[1], state), _over_tokens(through, state)]
        )
        return d_u, d_a


class _ParaLSTM(ElementwiseCell):
    """Parameters a_f, a_o, a_z, c_f, c_o; states cell, h."""

    bounded = True

    def __init__(self) -> None:
        super().__init__(self._step, num_states=2)

    @staticmethod
    def _step(h: Tensor, u: Tensor, p: Tensor) -> Tensor:
        cell, state = h
        f = torch.addcmul(torch.addcmul(u[0], p[0], state), p[3], cell).sigmoid()
        z = torch.addcmul(u[2], p[2], state).tanh()
        new = torch.lerp(z, cell, f)
        o = torch.addcmul(torch.addcmul(u[1], p[1], state), p[4], new).sigmoid()
        return torch.stack([new, o * torch.tanh(new)])

    def linearize(self, h: Tensor, x: Tensor, parameters: Tensor) -> Linear:
        (a_f, a_o, a_z, c_f, c_o), (cell, state) = parameters, h
        value = torch.empty_like(h)
        new, out = value
        f = torch.addcmul(x[0], a_f, state).addcmul_(c_f, cell).sigmoid_()
        z = torch.addcmul(x[2], a_z, state).tanh_()
        torch.lerp(z, cell, f, out=new)
        o = torch.addcmul(x[1], a_o, state).addcmul_(c_o, new).sigmoid_()
        t = torch.tanh(new)
        torch.mul(o, t, out=out)
        kept = 1 - f
        to_z = z.mul(z).neg_().add_(1).mul_(kept)  # dcell'/d(pre-activation of z)
        to_f = cell.sub(z).mul_(f).mul_(kept)
        to_o = torch.addcmul(o, o, o, value=-1).mul_(t)  # dh'/d(pre-activation of o)
        by_cell = torch.addcmul(o, out, t, value=-1).addcmul_(to_o, c_o)  # dh'/dcell'
        jacobian = value.new_empty(2, *value.shape)
        torch.addcmul(f, to_f, c_f, out=jacobian[0, 0])
        torch.mul(to_f, a_f, out=jacobian[0, 1]).addcmul_(to_z, a_z)
        torch.mul(by_cell, jacobian[0], out=jacobian[1])
        jacobian[1, 1].addcmul_(to_o, a_o)
        return value, jacobian, (h, new, to_f, to_z, to_o, by_cell)

    def vjp(self, known: Any, parameters: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        (cell, state), new, to_f, to_z, to_o, by_cell = known
        d_u = cotangent.new_empty(3, *cotangent.shape[1:])
        d_new = torch.addcmul(cotangent[0], cotangent[1], by_cell)
        torch.mul(d_new, to_f, out=d_u[0])
        torch.mul(cotangent[1], to_o, out=d_u[1])
        torch.mul(d_new, to_z, out=d_u[2])
        d_a = _over_tokens(d_u, state)
        d_c = torch.stack([_over_tokens(d_u[0], cell), _over_tokens(d_u[1], new)])
        return d_u, torch.cat([d_a, d_c])
