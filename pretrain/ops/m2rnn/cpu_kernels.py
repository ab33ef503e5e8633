"""M2RNN's loops over time for CPUs, compiled by numba: some heads of some sequences.

States lie transposed, ``[V, K]``: innermost loops run along K and vectorise. V is a multiple of 4,
as products take four rows at a time, against their loads and stores. A block's states and what is
inside tanh lie as ``[V, steps, K]``, so that sums over all steps of a block run along one row.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numba.core import types
from numba.extending import overload

from pretrain.ops.shared.cpu_compilation import compiled

# tanh(x) = x P(x^2) / Q(x^2), by powers from 0; beyond LIMIT it is 1 to a rounding of float32. The
# largest error found is 4.7 roundings, 2.8e-7.
LIMIT, ONE = np.float32(9.0), np.float32(1.0)
P0, P1, P2, P3, P4, P5 = (
    np.float32(c)
    for c in (
        *(1.0, 0.1368246672136431, 0.003871500379299362),
        *(2.80699771639086e-05, 3.0729375413249356e-08, -1.2305135953768098e-11),
    )
)
Q0, Q1, Q2, Q3, Q4 = (
    np.float32(c)
    for c in (
        *(1.0, 0.4701579922848937, 0.02725751386445786),
        *(0.00039441715451517695, 1.2916547778281158e-06),
    )
)


def tanh(x):
    """Return tanh of x: the C library's in float64, in float32 a quotient that vectorises."""
    raise NotImplementedError("only in compiled code")


@overload(tanh, fastmath={"contract", "reassoc", "nsz"}, inline="never")
def _tanh(x):
    def library(x):
        return math.tanh(x)

    def quotient(x):
        # Comparisons that are false for NaN, which goes on.
        y = LIMIT if x > LIMIT else x
        y = -LIMIT if y < -LIMIT else y
        s = y * y
        numerator = P0 + s * (P1 + s * (P2 + s * (P3 + s * (P4 + s * P5))))
        denominator = Q0 + s * (Q1 + s * (Q2 + s * (Q3 + s * Q4)))
        t = y * numerator / denominator
        t = ONE if t > ONE else t  # as roundings would have it exceed 1
        return -ONE if t < -ONE else t

    return quotient if x == types.float32 else library


@partial(compiled, noalias=True)
def add_product(a, b, i, z0, z1, z2, z3, at):
    """Add a ``[V, V]`` times ``b[:, i]`` to ``z[:, at]``; z is given four times, b is another."""
    for u in range(0, a.shape[0], 4):
        for w in range(0, a.shape[0], 4):
            a00, a01, a02, a03 = a[u, w], a[u, w + 1], a[u, w + 2], a[u, w + 3]
            a10, a11, a12, a13 = a[u + 1, w], a[u + 1, w + 1], a[u + 1, w + 2], a[u + 1, w + 3]
            a20, a21, a22, a23 = a[u + 2, w], a[u + 2, w + 1], a[u + 2, w + 2], a[u + 2, w + 3]
            a30, a31, a32, a33 = a[u + 3, w], a[u + 3, w + 1], a[u + 3, w + 2], a[u + 3, w + 3]
            for j in range(z0.shape[2]):
                b0, b1, b2, b3 = b[w, i, j], b[w + 1, i, j], b[w + 2, i, j], b[w + 3, i, j]
                z0[u, at, j] += a00 * b0 + a01 * b1 + a02 * b2 + a03 * b3
                z1[u + 1, at, j] += a10 * b0 + a11 * b1 + a12 * b2 + a13 * b3
                z2[u + 2, at, j] += a20 * b0 + a21 * b1 + a22 * b2 + a23 * b3
                z3[u + 3, at, j] += a30 * b0 + a31 * b1 + a32 * b2 + a33 * b3


@partial(compiled, noalias=True)
def add_pairs(a, b, size, out):
    """Add to ``out`` ``[V, V]`` the products of the first ``size`` of the rows of a and of b."""
    for u in range(0, out.shape[0], 2):
        for w in range(0, out.shape[0], 4):
            c00 = c01 = c02 = c03 = c10 = c11 = c12 = c13 = out[u, w] * 0
            for j in range(size):
                a0, a1 = a[u, j], a[u + 1, j]
                b0, b1, b2, b3 = b[w, j], b[w + 1, j], b[w + 2, j], b[w + 3, j]
                c00 += a0 * b0
                c01 += a0 * b1
                c02 += a0 * b2
                c03 += a0 * b3
                c10 += a1 * b0
                c11 += a1 * b1
                c12 += a1 * b2
                c13 += a1 * b3
            out[u, w] += c00
            out[u, w + 1] += c01
            out[u, w + 2] += c02
            out[u, w + 3] += c03
            out[u + 1, w] += c10
            out[u + 1, w + 1] += c11
            out[u + 1, w + 2] += c12
            out[u + 1, w + 3] += c13


@partial(compiled, noalias=True)
def start_step(keys, values, z, at):
    """Set ``z[:, at]`` to the outer product of values and keys."""
    for u in range(z.shape[0]):
        value = values[u]
        for j in range(z.shape[2]):
            z[u, at, j] = value * keys[j]


@partial(compiled, noalias=True)
def end_step(forget, before, i, z, at, after, o):
    """Apply tanh to ``z[:, at]``, and set ``after[:, o]`` to the states that follow."""
    for u in range(z.shape[0]):
        for j in range(z.shape[2]):
            inner = tanh(z[u, at, j])
            z[u, at, j] = inner
            after[u, o, j] = inner + forget * (before[u, i, j] - inner)


@partial(compiled, noalias=True)
def read(queries, states, i, out):
    """Set ``out`` ``[V]`` to the products of the states ``[:, i]`` with the queries."""
    for u in range(0, states.shape[0], 4):
        y0 = y1 = y2 = y3 = queries[0] * 0
        for j in range(states.shape[2]):
            q = queries[j]
            y0 += q * states[u, i, j]
            y1 += q * states[u + 1, i, j]
            y2 += q * states[u + 2, i, j]
            y3 += q * states[u + 3, i, j]
        out[u] = y0
        out[u + 1] = y1
        out[u + 2] = y2
        out[u + 3] = y3


@partial(compiled, noalias=True)
def add_columns(coefficients, states, i, out):
    """Add to ``out`` ``[K]`` the rows of the states ``[:, i]``, each times its coefficient."""
    for u in range(0, states.shape[0], 4):
        c0, c1, c2, c3 = (
            coefficients[u],
            coefficients[u + 1],
            coefficients[u + 2],
            coefficients[u + 3],
        )
        for j in range(states.shape[2]):
            out[j] += (
                c0 * states[u, i, j]
                + c1 * states[u + 1, i, j]
                + c2 * states[u + 2, i, j]
                + c3 * states[u + 3, i, j]
            )


@partial(compiled, noalias=True)
def step_back(d_output, queries, forget, clip, before, z, i, carried):
    """Return df; make ``z[:, i]`` the gradient inside tanh, ``carried`` that of the state before.

    What goes through the weight is still missing from ``carried``.
    """
    df = forget * 0
    write = forget * 0 + 1 - forget
    for u in range(z.shape[0]):
        dy = d_output[u]
        for j in range(z.shape[2]):
            c = carried[u, 0, j]
            c = clip if c > clip else c
            c = -clip if c < -clip else c
            d = c + dy * queries[j]
            inner = z[u, i, j]
            df += (before[u, i, j] - inner) * d
            z[u, i, j] = d * write * (1 - inner * inner)
            carried[u, 0, j] = d * forget
    return df


@compiled
def forward(q, k, v, f, weight, sequences, heads, every, starts, finals, y):
    """Run heads ``heads[0]`` to ``heads[1]`` of some sequences.

    q ``[T, Hq, K]``, k, v ``[T, H, V]``, f ``[T, H]``, weight ``[H, V, V]``. ``sequences``
    ``[n, 4]``: a sequence's number, first token, length and first block. ``starts``
    ``[blocks, H, V, K]`` keeps the state before each block of ``every`` steps, or has none of them;
    ``finals`` ``[N, H, V, K]`` holds the states to start from, and then those at the end.
    """
    num_heads, width = v.shape[1], v.shape[2]
    keys = k.shape[2]
    z = np.empty((width, 1, keys), v.dtype)
    states = np.empty((width, 2, keys), v.dtype)
    for h in range(heads[0], heads[1]):
        hq, hk = h * q.shape[1] // num_heads, h * k.shape[1] // num_heads
        matrix = weight[h].T.copy()
        for number, first, length, block in sequences:
            states[:, 0] = finals[number, h]
            for t in range(length):
                i, token = t % 2, first + t
                if starts.shape[0] and t % every == 0:
                    starts[block + t // every, h] = states[:, i]
                start_step(k[token, hk], v[token, h], z, 0)
                add_product(matrix, states, i, z, z, z, z, 0)
                end_step(f[token, h], states, i, z, 0, states, 1 - i)
                read(q[token, hq], states, 1 - i, y[token, h])
            finals[number, h] = states[:, length % 2]


@compiled
def backward(
    q,
    k,
    v,
    f,
    weight,
    sequences,
    heads,
    every,
    clip,
    starts,
    slots,
    dy,
    dq,
    dk,
    dv,
    df,
    d_weight,
    d_states,
):
    """Run :func:`forward`'s heads and sequences backward.

    dq ``[slots, T, Hq, K]`` and dk alike are zeros, to which head h adds at ``slots[:, h]``;
    ``d_weight`` ``[H, V, V]`` are zeros; ``d_states`` ``[N, H, V, K]`` becomes that of the states
    at the start.
    """
    num_heads, width = v.shape[1], v.shape[2]
    keys = k.shape[2]
    longest = 0
    for _, _, length, _ in sequences:
        longest = max(longest, length)
    every = min(every, longest)
    # One step more than is used: rows a power of two apart fall on one another in a cache.
    flat_z = np.empty((width, (every + 1) * keys), v.dtype)
    flat_states = np.empty((width, (every + 1) * keys), v.dtype)
    z = flat_z.reshape(width, every + 1, keys)
    states = flat_states.reshape(width, every + 1, keys)
    carried = np.empty((width, 1, keys), v.dtype)
    for h in range(heads[0], heads[1]):
        hq, hk = h * q.shape[1] // num_heads, h * k.shape[1] // num_heads
        transposed, matrix = weight[h].T.copy(), weight[h]
        for number, first, length, block in sequences:
            carried[:, 0] = d_states[number, h]
            blocks = (length + every - 1) // every
            for b in range(blocks - 1, -1, -1):
                begin = first + b * every
                count = min(every, first + length - begin)
                states[:, 0] = starts[block + b, h]
                for i in range(count):
                    start_step(k[begin + i, hk], v[begin + i, h], z, i)
                    add_product(transposed, states, i, z, z, z, z, i)
                    end_step(f[begin + i, h], states, i, z, i, states, i + 1)
                    add_columns(dy[begin + i, h], states, i + 1, dq[slots[0, h], begin + i, hq])
                for i in range(count - 1, -1, -1):
                    token = begin + i
                    df[token, h] = step_back(
                        dy[token, h], q[token, hq], f[token, h], clip, states, z, i, carried
                    )
                    add_product(matrix, z, i, carried, carried, carried, carried, 0)
                    add_columns(v[token, h], z, i, dk[slots[1, h], token, hk])
                    read(k[token, hk], z, i, dv[token, h])
                add_pairs(flat_states, flat_z, count * keys, d_weight[h])
            d_states[number, h] = carried[:, 0]
