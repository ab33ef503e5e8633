"""The norm by its formula, and its gradient, written by hand on a CPU, by autograd's."""

import pytest
import torch

from pretrain.ops.elementwise.rms_norm import rms_norm
from tests.helpers.relative_error import relative_error


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 3, 8), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_and_gradient(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for size in (shape, (8,), shape)
    )
    exact = [t.double().requires_grad_() for t in (x, weight)]
    a, w = exact
    y = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-3) * w
    expected = [y, *torch.autograd.grad(y, exact, gradient.double())]
    leaves = [t.requires_grad_() for t in (x, weight)]
    y = rms_norm(leaves[0], leaves[1], 1e-3)
    found = [y, *torch.autograd.grad(y, leaves, gradient)]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for wanted, got in zip(expected, found, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, wanted) < tolerance


def test_only_what_needs_a_gradient_has_one():
    x, weight = torch.randn(3, 4), torch.randn(4, requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is not None and x.grad is None
