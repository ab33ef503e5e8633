"""The cells of ParaGRU and ParaLSTM with derivatives by hand, as Newton's method needs them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pretrain.ops.newton.cell import ElementwiseCell, Linear


def _over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """Sum ``a b`` over all axes but the last (and the first, where ``a`` has one more)."""
    return (a * b).flatten(-3, -2).sum(-2)


class ParaGRU(ElementwiseCell):
    """The cell of ``para_gru``: parameters a_z, a_r, a_c."""

    bounded = shooting = True

    def __init__(self) -> None:
        super().__init__(self._step)

    @staticmethod
    def _gates(h: Tensor, u: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (2, *[1] * (u.ndim - 2), u.shape[-1])
        z, r = torch.addcmul(u[:2], a[:2].view(shape), h).sigmoid().unbind(0)
        return z, r, torch.addcmul(u[2], a[2], r * h[0]).tanh()

    @staticmethod
    def _step(h: Tensor, u: Tensor, a: Tensor) -> Tensor:
        z, _, c = ParaGRU._gates(h, u, a)
        return torch.lerp(h[0], c, z)[None]

    @override
    def log_keep(self, h: Tensor, x: Tensor, parameters: Tensor) -> Tensor:
        return F.logsigmoid(-torch.addcmul(x[0], parameters[0], h[0]))

    @override
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

    @override
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


class ParaLSTM(ElementwiseCell):
    """The cell of ``para_lstm``: parameters a_f, a_o, a_z, c_f, c_o; states cell, h."""

    bounded = shooting = True

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

    @override
    def log_keep(self, h: Tensor, x: Tensor, parameters: Tensor) -> Tensor:
        (a_f, _, _, c_f, _), (cell, state) = parameters, h
        return F.logsigmoid(torch.addcmul(torch.addcmul(x[0], a_f, state), c_f, cell))

    @override
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

    @override
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
