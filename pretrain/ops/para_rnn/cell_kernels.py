"""ParaGRU's and ParaLSTM's cells with their derivatives, for the kernels of both directions."""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.shared.elementary_kernels import sigmoid, tanh


@triton.jit
def gru_cell(h, u_z, u_r, u_c, a_z, a_r, a_c, APPROXIMATE: tl.constexpr):
    """Return h', dh'/dh, and what the gradients need.

    That is r, and h' by the pre-activations of z, r, c.
    """
    z = sigmoid(u_z + a_z * h)
    r = sigmoid(u_r + a_r * h)
    c = tanh(u_c + a_c * (r * h), APPROXIMATE)
    step = z * (c - h)
    to_z = step * (1.0 - z)
    to_c = z * (1.0 - c * c)
    through = to_c * (a_c * r)
    to_r = through * (h * (1.0 - r))
    jacobian = 1.0 - z + to_z * a_z + to_r * a_r + through
    return h + step, jacobian, r, to_z, to_r, to_c


@triton.jit
def lstm_cell(cell, h, u_f, u_o, u_z, a_f, a_o, a_z, c_f, c_o, APPROXIMATE: tl.constexpr):
    """Return c', h', the Jacobian by rows (to cell, to h), and what the gradients want."""
    f = sigmoid(u_f + a_f * h + c_f * cell)
    z = tanh(u_z + a_z * h, APPROXIMATE)
    new = z + f * (cell - z)
    o = sigmoid(u_o + a_o * h + c_o * new)
    t = tanh(new, APPROXIMATE)
    to_z = (1.0 - z * z) * (1.0 - f)
    to_f = (cell - z) * f * (1.0 - f)
    to_o = t * o * (1.0 - o)
    by_cell = o * (1.0 - t * t) + to_o * c_o
    j_cc = f + to_f * c_f
    j_ch = to_f * a_f + to_z * a_z
    j_hc = by_cell * j_cc
    j_hh = by_cell * j_ch + to_o * a_o
    return new, o * t, j_cc, j_ch, j_hc, j_hh, to_f, to_z, to_o, by_cell
