"""The ops that benchmarks/ops_gpu.py times, at the shapes of the models' layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.nn.mixers.parts import delta_rule_flops, dplr_flops, linear_attention_flops
from pretrain.ops import (
    attention,
    comba,
    delta_rule,
    dplr,
    gdn2,
    linear_attention,
    m2rnn,
    mesa,
    para_gru,
    para_lstm,
    rnn,
    short_convolution,
)
from pretrain.ops.attention.dispatch import fast_attention
from pretrain.ops.cross_entropy.linear_cross_entropy import linear_cross_entropy
from pretrain.ops.rnn.cells import CELLS

SIZES = {"410M": 1024, "1B": 2048, "7B": 4096}  # model widths
TOKENS = 32768  # of all sequences together
Run = Callable[[str], Any]  # backend to output (and states)


@dataclass
class Case:
    """An op to time.

    make: takes (width, batch size, T, dtype) and returns the tensors with gradients, and a call by
    backend; flops: tensor-core FLOPs of a token's forward pass, from the tensors; definition, fast,
    alternative: backends.
    """

    name: str
    make: Callable[[int, int, int, torch.dtype], tuple[list[Tensor], Run]]
    flops: Callable[[Sequence[Tensor]], float]
    definition: str
    fast: str
    alternative: str
    longest_alternative: int = 65536
    states: int = 0  # tensors as large as the output that the backward pass reads, that among them


def normal(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def cases(device: str) -> list[Case]:
    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        return normal(device, dtype, *shape)

    def wide(dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    def uniform(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.rand(shape, device=device).to(dtype)

    def softmax(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
        q, k, v = (of(dtype, batch, length, max(width // 128, 1), 128) for _ in "qkv")
        return [q, k, v], lambda backend: attention(q, k, v, backend=backend)

    def delta(steps: int, channel: bool = False) -> Any:
        def make(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
            heads, value_dim = max(width // 256, 1), 128 if channel else 256
            q = of(dtype, batch, length, heads, 128)
            k = F.normalize(of(dtype, batch, steps * length, heads, 128), dim=-1)
            v = of(dtype, batch, steps * length, heads, value_dim)
            beta = uniform(dtype, batch, steps * length, heads)
            decay = -uniform(wide(dtype), *q.shape[: 4 if channel else 3])
            return [q, k, v, beta, decay], lambda backend: delta_rule(
                q, k, v, beta, log_decay=decay, num_householder=steps, backend=backend
            )

        return make

    def low_rank(op: Callable[..., Any]) -> Any:
        def make(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
            dim = 64 if op is dplr else 128
            q, k, v, erase = (of(dtype, batch, length, max(width // dim, 1), dim) for _ in "qkve")
            k, erase = F.normalize(k, dim=-1), F.normalize(erase, dim=-1)
            rate = uniform(dtype, *q.shape)
            decay = -0.6 * uniform(wide(dtype), *q.shape[: 3 if op is comba else 4])
            options: dict[str, Any] = {}
            if op is dplr:  # as in RWKV-7
                others, options = [-erase, erase * rate], {"scale": 1.0, "lower_bound": -0.61}
            else:
                others = [erase, rate[..., 0]] if op is comba else [rate, uniform(dtype, *v.shape)]
            return [q, k, v, *others, decay], lambda backend: op(
                q, k, v, *others, log_decay=decay, backend=backend, **options
            )

        return make

    def linear(axes: int) -> Any:
        def make(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
            heads = max(width // 256, 1)
            q, k = (of(dtype, batch, length, heads, 128) for _ in "qk")
            v = of(dtype, batch, length, heads, 256)
            decay = -uniform(wide(dtype), *q.shape[:axes])
            return [q, k, v, decay], lambda backend: linear_attention(
                q, k, v, log_decay=decay, backend=backend
            )

        return make

    def matrix_rnn(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
        heads = max(84 * width // 1024, 2)
        q, k = (of(dtype, batch, length, 1, 64) for _ in "qk")
        v, weight = of(dtype, batch, length, heads, 16), of(dtype, heads, 16, 16) / 4
        forget = uniform(wide(dtype), batch, length, heads)
        return [q, k, v, weight, forget], lambda backend: m2rnn(
            q, k, v, weight, forget, state_grad_clip=1.0, backend=backend
        )

    def regression(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
        shape = batch, length, max(width // 128, 1)
        q, k = (F.normalize(of(dtype, *shape, 128), dim=-1) for _ in "qk")
        v, beta, decay = of(dtype, *shape, 128), *(uniform(wide(dtype), *shape) for _ in "bd")
        ridge = torch.ones(shape[2], 128, device=device, dtype=wide(dtype))
        return [q, k, v, beta, ridge], lambda backend: mesa(
            q, k, v, beta, ridge, log_decay=-decay, backend=backend
        )

    def para(cell: str) -> Any:
        def make(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
            u = of(dtype, batch, length, 3, width)
            a, c, bias = (0.5 * torch.tanh(of(wide(dtype), n, width)) for n in (3, 2, 3))
            if cell == "gru":
                return [u, a, bias], lambda backend: para_gru(u, a, bias, backend=backend)
            return [u, a, c, bias], lambda backend: para_lstm(u, a, c, bias, backend=backend)

        return make

    def classical(cell: str, dim: int) -> Any:
        def make(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
            kind, heads = CELLS[cell], max(width // dim, 1)
            x = of(dtype, batch, length, kind.gates, heads, dim)
            weight = of(dtype, heads, dim, kind.gates, dim) / dim**0.5
            bias = of(wide(dtype), kind.biases, heads, dim)
            return [x, weight, bias], lambda backend: rnn(
                x, weight, bias, cell=cell, backend=backend
            )

        return make

    def convolution(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
        x, weight = of(dtype, batch, length, width), of(dtype, width, 4)
        return [x, weight], lambda backend: short_convolution(
            x, weight, activation="silu", backend=backend
        )

    def head(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
        vocab = 100352 if width >= min(SIZES.values()) else 100
        x, weight = of(dtype, batch * length, width), of(dtype, vocab, width) / width**0.5
        targets = torch.randint(0, vocab, (batch * length,), device=device)
        return [x, weight], lambda backend: linear_cross_entropy(
            x, weight, targets, tokens_at_once=4096, backend=backend
        )

    def rule(steps: int, per_channel: bool = False) -> Callable[[Sequence[Tensor]], float]:
        return lambda t: (
            t[0].shape[2]
            * delta_rule_flops(t[0].shape[-1], t[2].shape[-1], 64, steps, per_channel=per_channel)
        )

    def read(per_channel: bool = False) -> Callable[[Sequence[Tensor]], float]:
        return lambda t: (
            t[0].shape[2]
            * linear_attention_flops(t[0].shape[-1], t[2].shape[-1], 64, per_channel=per_channel)
        )

    fastest = fast_attention(torch.empty(1, 128, dtype=torch.bfloat16, device=device))

    def none(_: Sequence[Tensor]) -> float:
        return 0.0

    return [
        Case(
            "attention",
            softmax,
            lambda t: 2.0 * t[0].shape[1] * t[0].shape[2] * 128,
            "explicit",
            fastest,
            "sdpa",
        ),
        Case("delta_rule (gdn)", delta(1), rule(1), "recurrent", "fla", "chunked"),
        Case("delta_rule n=2", delta(2), rule(2), "recurrent", "fla", "chunked"),
        Case(
            "delta_rule (kda)", delta(1, True), rule(1, True), "recurrent", "fla", "chunked", 4096
        ),
        Case(
            "dplr (rwkv7)",
            low_rank(dplr),
            lambda t: t[0].shape[2] * dplr_flops(64, 64, 64, per_channel=True),
            "recurrent",
            "fla",
            "chunked",
            4096,
        ),
        Case("gdn2", low_rank(gdn2), rule(1, True), "recurrent", "fla", "chunked", 4096),
        Case("comba", low_rank(comba), rule(1), "recurrent", "fla", "chunked"),
        Case("linear_attention (mamba2)", linear(3), read(), "recurrent", "fla", "chunked"),
        Case("linear_attention (gla)", linear(4), read(True), "recurrent", "fla", "chunked", 4096),
        Case(
            "mesa",
            regression,  # of which each iteration is about a linear attention
            lambda t: 30 * t[0].shape[2] * linear_attention_flops(128, 128, 64),
            "recurrent",
            "fla",
            "conjugate_gradients",
        ),
        Case(
            "m2rnn",
            matrix_rnn,
            lambda t: 2.0 * t[2].shape[2] * t[0].shape[-1] * t[2].shape[-1] ** 2,
            "recurrent",
            "triton",
            "checkpointed",
            1024,
        ),
        *(
            Case(
                f"para_{cell}, {how}",
                para(cell),
                none,
                "sequential",
                f"triton_{how}",
                "newton",
                states=states,
            )
            for cell, states in (("gru", 1), ("lstm", 2))
            for how in ("shooting", "steps")
        ),
        *(
            Case(
                f"rnn {cell} D={d}",
                classical(cell, d),
                lambda t: 2.0 * t[1].numel(),
                "recurrent",
                "triton",
                "checkpointed",
                1024,
            )
            for cell in CELLS
            for d in (64, 128)
        ),
        Case("short_convolution", convolution, none, "taps", "fla", "taps"),
        Case(
            "linear_cross_entropy",
            head,
            lambda t: 2.0 * t[1].numel(),
            "chunked",
            "liger",
            "chunked",
            4096,
        ),
    ]
