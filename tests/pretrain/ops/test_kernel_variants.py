"""What changes with every micro-batch compiles no kernel again in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.kernels_compiled import launches
from pretrain.ops import para_gru, para_lstm, rnn
from pretrain.ops.rnn.cells import CELLS

# As many tokens and documents as triton would compile variants for: 1, multiples of 16, others.
MICRO_BATCHES = ([4096], [4096] + [1] * 15, [8192, 8192], [4095, 4096, 7])


def matrix(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def classical(cell: str, tokens: int, cu_seqlens: Tensor) -> Tensor:
    gates, biases = CELLS[cell].gates, CELLS[cell].biases
    weight, bias = matrix(2, 64, gates, 64), matrix(biases, 2, 64).float()
    x = matrix(1, tokens, gates, 2, 64)
    return rnn(x, weight, bias, cell=cell, cu_seqlens=cu_seqlens, state_grad_clip=1.0)[0]


def parallel(op: str, backend: str, tokens: int, cu_seqlens: Tensor) -> Tensor:
    x, a, bias = matrix(1, tokens, 3, 1024), matrix(3, 1024).float(), matrix(3, 1024).float()
    if op == "para_gru":
        return para_gru(x, a, bias, cu_seqlens=cu_seqlens, backend=backend)[0]
    c = matrix(2, 1024).float()
    return para_lstm(x, a, c, bias, cu_seqlens=cu_seqlens, backend=backend)[0]


OPS: dict[str, Callable[[int, Tensor], Tensor]] = {
    **{cell: lambda *batch, cell=cell: classical(cell, *batch) for cell in CELLS},
    **{
        f"{op} {way}": lambda *batch, op=op, way=way: parallel(op, f"triton_{way}", *batch)
        for op in ("para_gru", "para_lstm")
        for way in ("steps", "shooting")
    },
}


def variant(kernel: Any, arguments: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return what a compiled kernel is good for besides the types of its arguments."""
    free = getattr(kernel, "do_not_specialize", None)  # of a kernel that will be compiled
    if free is None:
        free = kernel.kwargs.get("do_not_specialize") or ()  # of one that is interpreted
    found = dict(options)
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(value, int) and name not in free:
            found[name] = value if value == 1 else f"{name} % 16 = {value % 16 == 0}"
    return found


@pytest.mark.parametrize("op", OPS)
def test_one_variant_serves_every_micro_batch(op):
    seen: dict[str, list[dict[str, Any]]] = {}
    for lengths in MICRO_BATCHES:
        starts = torch.tensor([0, *lengths]).cumsum(0)
        for kernel, arguments, options in launches(lambda s=starts: OPS[op](int(s[-1]), s)):
            name = kernel.fn.__name__
            found = variant(kernel, arguments, options)
            if found not in seen.setdefault(name, []):
                seen[name].append(found)
    assert len(seen) == 2
    assert {name: len(variants) for name, variants in seen.items()} == dict.fromkeys(seen, 1), seen
