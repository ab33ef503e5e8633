"""The classical cells' steps and derivatives (:mod:`pretrain.ops.rnn.cells`), elementwise.

``g0`` to ``g3`` are the pre-activations of a cell's gates in their order, of the third without what
the recurrent matrix gave, ``r2``: a GRU's reset gate multiplies that, with its bias. Tensors that a
cell does not have may be anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.shared.elementary_kernels import divide, exp, log, sigmoid, tanh


@triton.jit
def clamp(x, limit):
    """Bound x by ``limit`` either way; what is no number stays none."""
    return tl.clamp(x, -limit, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - log(1.0 + exp(-tl.abs(x)))


@triton.jit
def next_state(g0, g1, g2, r2, g3, h, cell, n, m, CELL: tl.constexpr, APPROXIMATE: tl.constexpr):
    """Return h, and sLSTM's cell, normaliser n and stabiliser m, after a token."""
    if CELL == "elman":
        h = tanh(g0, APPROXIMATE)
    if CELL == "gru":
        new = tanh(g2 + sigmoid(g0) * r2, APPROXIMATE)
        h = new + sigmoid(g1) * (h - new)
    if CELL == "lstm":
        cell = sigmoid(g1) * cell + sigmoid(g0) * tanh(g2 + r2, APPROXIMATE)
        h = sigmoid(g3) * tanh(cell, APPROXIMATE)
    if CELL == "slstm":
        kept = _log_sigmoid(g1) + m
        m = tl.maximum(g0, kept)
        write, keep = exp(g0 - m), exp(kept - m)
        cell = keep * cell + write * tanh(g2 + r2, APPROXIMATE)
        n = keep * n + write
        h = divide(sigmoid(g3) * cell, n)
    return h, cell, n, m


@triton.jit
def gradients(
    g0,
    g1,
    g2,
    r2,
    g3,
    h,
    cell,
    n,
    m,
    d,
    d_cell,
    d_n,
    d_m,
    CELL: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Return the gradients of one step, from those of the states after it and its states before.

    ``d``, ``d_cell``, ``d_n``, ``d_m`` to those of g0, g1, g2 (and r2), g3 and the states before,
    of h without what goes through the recurrent matrices.
    """
    d1, d2, d3, d_r2 = d, d, d, d
    before = d * 0.0
    if CELL == "elman":
        value = tanh(g0, APPROXIMATE)
        d0 = d * (1.0 - value * value)
    if CELL == "gru":
        s, u = sigmoid(g0), sigmoid(g1)
        new = tanh(g2 + s * r2, APPROXIMATE)
        d2 = d * (1.0 - u) * (1.0 - new * new)
        d1 = d * (h - new) * u * (1.0 - u)
        d0 = d2 * r2 * s * (1.0 - s)
        d_r2 = d2 * s
        before = d * u
    if CELL == "lstm":
        i, f, o, z = sigmoid(g0), sigmoid(g1), sigmoid(g3), tanh(g2 + r2, APPROXIMATE)
        read = tanh(f * cell + i * z, APPROXIMATE)
        d3 = d * read * o * (1.0 - o)
        d_cell = d_cell + d * o * (1.0 - read * read)
        d0 = d_cell * z * i * (1.0 - i)
        d1 = d_cell * cell * f * (1.0 - f)
        d2 = d_cell * i * (1.0 - z * z)
        d_r2 = d2
        d_cell = d_cell * f
    if CELL == "slstm":
        o, z = sigmoid(g3), tanh(g2 + r2, APPROXIMATE)
        kept = _log_sigmoid(g1) + m
        new_m = tl.maximum(g0, kept)
        write, keep = exp(g0 - new_m), exp(kept - new_m)
        inverse = divide(1.0, keep * n + write)
        ratio = (keep * cell + write * z) * inverse
        d3 = d * ratio * o * (1.0 - o)
        d_cell = d_cell + d * o * inverse
        d_n = d_n - d * o * ratio * inverse
        by_write = (d_cell * z + d_n) * write
        by_keep = (d_cell * cell + d_n * n) * keep
        by_m = d_m - by_write - by_keep
        newer = g0 > kept
        d0 = by_write + tl.where(newer, by_m, 0.0)
        d_m = by_keep + tl.where(newer, 0.0, by_m)
        d1 = d_m * (1.0 - sigmoid(g1))
        d2 = d_cell * write * (1.0 - z * z)
        d_r2 = d2
        d_cell, d_n = d_cell * keep, d_n * keep
    return d0, d1, d2, d_r2, d3, before, d_cell, d_n, d_m
