"""What GPUs get compiled computes the same compiled: here by torch.compile's CPU compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint

from pretrain.models.mixers.parts import l2_norm, softplus_decay
from pretrain.ops.gating import silu_gate, swiglu
from tests.relative_error import relative_error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (silu_gate, [(2, 5, 8), (2, 5, 8)]),
        (swiglu, [(7, 16), (7, 16)]),
        (l2_norm, [(3, 4, 6)]),
        (softplus_decay, [(3, 4), (4,), (4,)]),
    ],
)
def test_compiled_functions(function, shapes):
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = []
    for run in (function, function.compiled):
        y = run(*inputs)
        results.append([y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel())
                                                 .view(y.shape)).sum(), inputs)])  # fmt: skip
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.slow
def test_compiled_functions_under_activation_checkpointing():
    """Forward and its recomputation must keep the same tensors, whatever the length."""
    weight = torch.randn(8, 8, requires_grad=True)

    gate: Any = silu_gate

    def block(x, run):
        return x + run(x @ weight, x)

    for length in (5, 9, 5):
        x, gradients = torch.randn(length, 8), []
        for run in (gate, gate.compiled):
            y = torch.utils.checkpoint.checkpoint(block, x, run, use_reentrant=False)
            gradients.append(torch.autograd.grad(y.square().sum(), weight)[0])
        assert relative_error(gradients[1], gradients[0]) < 1e-5
