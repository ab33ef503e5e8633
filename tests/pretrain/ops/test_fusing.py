"""What GPUs get compiled computes the same compiled: here by torch.compile's CPU compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint

from pretrain.nn.mixers.lower_bounds import forget_above
from pretrain.nn.mixers.parts import l2_norm, softplus_decay
from pretrain.ops.attention.rotary import apply_rotary
from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.elementwise.gating import silu_gate, skip_silu_gate, swiglu
from pretrain.ops.elementwise.rms_norm import rms_norm_sigmoid_gate, rms_norm_silu_gate
from tests.helpers.relative_error import relative_error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "shapes", "rest"),
    [
        (silu_gate, [(2, 5, 8), (2, 5, 8)], ()),
        (skip_silu_gate, [(2, 5, 3, 4), (2, 5, 3, 4), (3, 1), (2, 5, 3, 4)], ()),
        (swiglu, [(7, 16), (7, 16)], ()),
        (rms_norm_silu_gate, [(2, 5, 8), (8,), (2, 5, 8)], (1e-5,)),
        (rms_norm_sigmoid_gate, [(2, 5, 3, 8), (3, 8), (2, 5, 3, 8)], (1e-5,)),
        (apply_rotary, [(2, 5, 3, 8), (2, 5, 4), (2, 5, 4)], ()),
        (l2_norm, [(3, 4, 6)], ()),
        (softplus_decay, [(3, 4), (4,), (4,)], ()),
        (forget_above, [(3, 4), (4,)], ()),
    ],
)
def test_compiled_functions(function, shapes, rest):
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = []
    for run in (function, function.compiled):
        y = run(*inputs, *rest)
        y = torch.stack(y) if isinstance(y, tuple) else y
        results.append(
            [
                y,
                *torch.autograd.grad(
                    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), inputs
                ),
            ]
        )
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-5


def test_every_shape_of_a_hybrid_is_compiled(monkeypatch):
    """torch gives up on a function after 8 forms unless it is told otherwise."""
    compiled: list[Any] = []
    original: Any = torch.compile

    def remember(graph, _):
        compiled.append(graph)
        return graph.forward

    def gate(x, y):
        return x * y.sigmoid()

    monkeypatch.setattr(torch, "compile", lambda function: original(function, backend=remember))
    function: Any = fused(gate).compiled  # type: ignore[attr-defined]
    with torch._dynamo.config.patch(recompile_limit=8):
        for heads, dim in ((8, 64), (16, 128), (4, 256), (1, 8)):
            for batch_size, length in ((1, 32), (4, 1), (1, 1)):
                for gradients in (True, False):
                    function(
                        *torch.randn(2, batch_size, length, heads, dim, requires_grad=gradients)
                    )
    assert len(compiled) > 8


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
