"""The kernels of the classical cells as one differentiable function: launches, sizes and costs."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from typing_extensions import override

from pretrain.data.sequences import Sequences
from pretrain.ops.rnn import step_kernels, wide_kernels
from pretrain.ops.shared.launching import approximate, launch, power_of_two
from pretrain.ops.shared.planning import Work

BATCH = 8  # sequences of a program
# Channels of a head whose recurrent matrices fit a multiprocessor, by the bytes of a number.
WIDEST_ON_CHIP = {2: 128, 4: 64, 8: 32}


def kernels(x: Tensor) -> tuple[tuple[Any, Any], dict[str, int]]:
    """Return the kernels for ``[T, G, H, D]``, and a program's tile of channels and its warps."""
    dim = x.shape[-1]
    sizes = {"BLOCK_B": BATCH, "num_stages": 1}
    if dim > WIDEST_ON_CHIP[x.element_size()]:
        tile = {"BLOCK_D": 128, "BLOCK_FROM": 64, "num_warps": 8}
        return wide_kernels.KERNELS, sizes | tile
    block_d = max(16, power_of_two(dim))
    warps = 4 if block_d <= 64 else 8
    return step_kernels.KERNELS, sizes | {"BLOCK_D": block_d, "num_warps": warps}


def _work(x: Tensor, sequences: Sequences, *, backward: bool) -> Work:
    """Return the work by what the kernels compile to.

    That is 70 instructions of a warp for a token and gate of a program's sequences forward, 150
    backward, and some 300 and 400 cycles of waiting (benchmarks/kernels_compiled.py).
    """
    total, gates, num_heads, dim = x.shape
    longest, (_, sizes) = sequences.max_length, kernels(x)
    of_token = (150 if backward else 70) * gates
    cycles = of_token * max(sizes["num_warps"] / 4, 1) + (400 if backward else 300)
    if "BLOCK_FROM" in sizes:  # the matrices come from the L2 cache, 64 bytes a cycle
        of_token *= triton.cdiv(dim, sizes["BLOCK_D"])
        cycles += gates * dim**2 * x.element_size() / 64
    tiles = longest * triton.cdiv(sequences.count, BATCH) * num_heads
    return Work(
        2.0 * total * num_heads * gates * dim**2,
        tiles * of_token * sizes["num_warps"],
        longest * cycles,
    )


def _longest_first(sequences: Sequences) -> Tensor:
    return torch.argsort(sequences.sizes, descending=True, stable=True)


class ClassicalRNN(torch.autograd.Function):
    """The kernels as one differentiable function.

    x ``[T, G, H, D]``, weight ``[H, D, G, D]``, bias ``[4 or 1, H, D]``, initial ``[S, N, H, D]``
    to h ``[T, H, D]`` in x's dtype and the final states ``[S, N, H, D]``; ``save``: whether there
    will be a backward pass.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        cell: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        initial: Tensor,
        sequences: Sequences,
        clip: float | None,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        x, weight, bias, initial = (t.contiguous() for t in (x, weight, bias, initial))
        total, gates, num_heads, dim = x.shape
        num_sequences = initial.shape[1]
        out, final = x.new_empty(total, num_heads, dim), initial.clone()
        saved = initial.new_empty(len(initial) - 1 if save else 0, total, num_heads, dim)
        (kernel, _), sizes = kernels(x)
        launch(
            kernel,
            (triton.cdiv(num_sequences, BATCH), num_heads),
            _work(x, sequences, backward=False),
            x,
            weight,
            bias,
            initial,
            out,
            saved,
            final,
            sequences.cu_seqlens,
            sequences.derive(_longest_first),
            total,
            num_sequences,
            H=num_heads,
            D=dim,
            CELL=cell,
            GATES=gates,
            SAVE=save,
            APPROXIMATE=approximate(x.dtype),
            **sizes,
        )
        ctx.save_for_backward(x, weight, bias, initial, out, saved)
        ctx.sequences = sequences
        ctx.cell, ctx.clip = cell, clip
        return out, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial, out, saved = ctx.saved_tensors
        sequences: Sequences = ctx.sequences
        total, gates, num_heads, dim = x.shape
        wide = initial.dtype
        # What each token's recurrent product read: the output before it, or the initial state.
        before = torch.cat([out[:1], out[:-1]])
        first = (sequences.positions == 0).to(x.device)[:, None, None]
        ids = sequences.ids.to(x.device)
        before = torch.where(first, initial[0].to(x.dtype)[ids], before)
        before = before.transpose(0, 1)
        products = torch.bmm(before, weight.flatten(2).to(x.dtype))  # [H, T, G D]
        (_, kernel), sizes = kernels(x)
        d_x, d_initial = torch.empty_like(x), d_final.clone()
        launch(
            kernel,
            (triton.cdiv(initial.shape[1], BATCH), num_heads),
            _work(x, sequences, backward=True),
            x,
            weight,
            bias,
            initial,
            out,
            saved,
            products,
            d_out.contiguous(),
            d_final.contiguous(),
            d_x,
            d_initial,
            sequences.cu_seqlens,
            sequences.derive(_longest_first),
            total,
            initial.shape[1],
            ctx.clip or 0.0,
            H=num_heads,
            D=dim,
            CELL=ctx.cell,
            GATES=gates,
            CLIP=ctx.clip is not None,
            APPROXIMATE=approximate(x.dtype),
            **sizes,
        )
        d_weight = torch.bmm(before.mT, products).view_as(weight)
        d_bias = d_x.sum(0, dtype=wide)
        if ctx.cell == "gru":
            d_product = products.view(num_heads, total, gates, dim)[:, :, 2].sum(1, dtype=wide)
            d_bias = torch.cat([d_bias, d_product[None]])
        return (
            None,
            d_x,
            d_weight.to(weight.dtype),
            d_bias.to(bias.dtype),
            d_initial,
            None,
            None,
            None,
        )
