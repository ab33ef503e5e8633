"""A stand-in for the published Triton kernel of M2RNN, for benchmarks/ops_gpu.py only.

The published one is not on the package index. This one moves the same bytes: its backward pass runs
the forward pass again, writing the state after every token in the inputs' dtype, then steps back
and reads it; gradients of shared queries and keys, and of W, are added by float atomics. Its
arithmetic is this project's, so a difference in time is due to traffic, atomics and tiling.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.ops.m2rnn.step_kernels import KERNELS
from pretrain.ops.shared.elementary_kernels import tanh
from pretrain.ops.shared.launching import approximate, launch
from pretrain.ops.shared.planning import Work


@triton.jit
def _backward_kernel(
    q,
    k,
    v,
    weight,
    forget,
    history,
    dy,
    dq,
    dk,
    dv,
    df,
    dw,
    cu_seqlens,
    num_heads: tl.constexpr,
    q_heads: tl.constexpr,
    k_heads: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    sequence, head = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, K), tl.arange(0, V)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    q_head, k_head = head // (num_heads // q_heads), head // (num_heads // k_heads)
    dtype = q.dtype.element_ty
    in_weight = columns[:, None] * V + columns[None, :]
    w = tl.load(weight + head * V * V + in_weight).to(dtype)
    d_weight = tl.zeros([V, V], tl.float32)
    dh = tl.zeros([K, V], tl.float32)
    for back in range(0, length):
        token = start + length - 1 - back
        at = history + (token * num_heads + head) * K * V + rows[:, None] * V + columns[None, :]
        before = tl.load(at)
        q_t = tl.load(q + (token * q_heads + q_head) * K + rows).to(tl.float32)
        k_t = tl.load(k + (token * k_heads + k_head) * K + rows).to(tl.float32)
        v_t = tl.load(v + (token * num_heads + head) * V + columns).to(tl.float32)
        f_t = tl.load(forget + token * num_heads + head)
        dy_t = tl.load(dy + (token * num_heads + head) * V + columns).to(tl.float32)
        x = tl.dot(before, w, input_precision="ieee")
        z = tanh(x + k_t[:, None] * v_t[None, :], APPROXIMATE)
        after = z + f_t * (before.to(tl.float32) - z)
        d = dh + q_t[:, None] * dy_t[None, :]
        dx = d * ((1.0 - f_t) * (1.0 - z * z))
        narrow = dx.to(dtype)
        dh = f_t * d + tl.dot(narrow, tl.trans(w), input_precision="ieee")
        d_weight += tl.dot(tl.trans(before), narrow, input_precision="ieee")
        at_q = dq + (token * q_heads + q_head) * K + rows
        at_k = dk + (token * k_heads + k_head) * K + rows
        tl.atomic_add(at_q, tl.sum(after * dy_t[None, :], 1))
        tl.atomic_add(at_k, tl.sum(dx * v_t[None, :], 1))
        d_v = tl.sum(dx * k_t[:, None], 0).to(dv.dtype.element_ty)
        tl.store(dv + (token * num_heads + head) * V + columns, d_v)
        d_f = tl.sum(tl.sum(d * (before.to(tl.float32) - z), 1), 0)
        tl.store(df + token * num_heads + head, d_f)
    tl.atomic_add(dw + head * V * V + in_weight, d_weight)


class M2RNNWithHistory(torch.autograd.Function):
    """:class:`pretrain.ops.m2rnn.kernels.M2RNN` without states and clip.

    K and V are powers of two, K at most 64.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, forget: Tensor, cu: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, weight, forget, cu)
        return _run(q, k, v, weight, forget, cu, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weight, forget, cu = ctx.saved_tensors
        (total, heads, value_dim), key_dim = v.shape, q.shape[-1]
        history = q.new_empty(total, heads, key_dim, value_dim)  # what each token starts from
        _run(q, k, v, weight, forget, cu, history)
        wide = {"dtype": torch.float32, "device": q.device}
        dq, dk = torch.zeros(q.shape, **wide), torch.zeros(k.shape, **wide)
        dv, df, dw = (
            torch.empty_like(v),
            torch.empty_like(forget),
            torch.zeros(weight.shape, **wide),
        )
        launch(
            _backward_kernel,
            (len(cu) - 1, heads),
            Work(0, 0, 0),
            q,
            k,
            v,
            weight,
            forget,
            history,
            dy.contiguous(),
            dq,
            dk,
            dv,
            df,
            dw,
            cu,
            heads,
            q.shape[1],
            k.shape[1],
            K=key_dim,
            V=value_dim,
            APPROXIMATE=approximate(q.dtype),
            num_warps=4,
        )
        return dq.to(q.dtype), dk.to(k.dtype), dv, dw.to(weight.dtype), df, None


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    cu: Tensor,
    history: Tensor | None,
) -> Tensor:
    (total, heads, value_dim), key_dim = v.shape, q.shape[-1]
    y = torch.empty_like(v)
    state = torch.zeros(len(cu) - 1, heads, key_dim, value_dim, device=v.device)
    save = history is not None
    launch(
        KERNELS[0],
        (len(cu) - 1, heads, 1),
        Work(0, 0, 0),
        q,
        k,
        v,
        weight,
        forget,
        state,
        y,
        torch.empty_like(state),
        history if save else state,
        cu,
        cu[:-1].clone(),
        total,
        heads,
        q.shape[1],
        k.shape[1],
        K=key_dim,
        V=value_dim,
        BLOCK_K=key_dim,
        BLOCK_V=value_dim,
        CHUNK=1,
        SAVE=save,
        APPROXIMATE=approximate(q.dtype),
        num_warps=1,
        num_stages=1,
    )
    return y
