"""The kernels of the classical cells as one differentiable function: launches, sizes and costs."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from typing_extensions import override

from pretrain.data.sequences import Sequences
from pretrain.ops.rnn import row_kernels, step_kernels, wide_kernels
from pretrain.ops.shared.launching import approximate, launch, power_of_two, schedulers
from pretrain.ops.shared.planning import Work

BATCH = 8  # sequences of a program
# Channels of a head whose recurrent matrices fit a multiprocessor, by the bytes of a number.
WIDEST_ON_CHIP = {2: 128, 4: 64, 8: 32}


def kernels(x: Tensor, num_sequences: int) -> tuple[tuple[Any, Any], dict[str, int]]:
    """Return the kernels for ``[T, G, H, D]``, and a program's sequences, channels and warps."""
    num_heads, dim = x.shape[2:]
    if dim > WIDEST_ON_CHIP[x.element_size()]:
        sizes = {"BLOCK_B": BATCH, "BLOCK_D": 128, "BLOCK_FROM": 64, "num_warps": 8}
        return wide_kernels.KERNELS, sizes | {"num_stages": 1}
    block_d = max(16, power_of_two(dim))
    sizes = {"BLOCK_D": block_d, "num_warps": 4 if block_d <= 64 else 8, "num_stages": 1}
    if block_d <= 64 and num_sequences * num_heads <= schedulers(x.device) // 4:
        return row_kernels.KERNELS, sizes | {"BLOCK_B": 1}
    return step_kernels.KERNELS, sizes | {"BLOCK_B": BATCH}


def _work(x: Tensor, sequences: Sequences, *, backward: bool) -> Work:
    """Return the work by what the kernels compile to (benchmarks/kernels_compiled.py).

    Of a tile that is 70 instructions of a warp for a token and gate forward, 150 backward, and some
    300 and 700 cycles of waiting, of a sequence by itself 105 and 175, 200 and 250.
    """
    total, gates, num_heads, dim = x.shape
    longest, (_, sizes) = sequences.max_length, kernels(x, sequences.count)
    costs = ((105, 200), (175, 250)) if sizes["BLOCK_B"] == 1 else ((70, 300), (150, 700))
    of_gate, waits = costs[backward]
    of_token = of_gate * gates
    cycles = of_token * max(sizes["num_warps"] / 4, 1) + waits
    if "BLOCK_FROM" in sizes:  # the matrices come from the L2 cache, 64 bytes a cycle
        of_token *= triton.cdiv(dim, sizes["BLOCK_D"])
        cycles += gates * dim**2 * x.element_size() / 64
    tiles = longest * triton.cdiv(sequences.count, sizes["BLOCK_B"]) * num_heads
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
        (kernel, _), sizes = kernels(x, num_sequences)
        by_row = sizes["BLOCK_B"] == 1
        launch(
            kernel,
            (triton.cdiv(num_sequences, sizes["BLOCK_B"]), num_heads),
            _work(x, sequences, backward=False),
            x,
            weight.transpose(1, 3).contiguous() if by_row else weight,
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
        (_, kernel), sizes = kernels(x, initial.shape[1])
        d_x, d_initial = torch.empty_like(x), d_final.clone()
        launch(
            kernel,
            (triton.cdiv(initial.shape[1], sizes["BLOCK_B"]), num_heads),
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
