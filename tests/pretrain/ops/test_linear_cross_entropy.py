"""Head and loss piece by piece against torch's cross entropy of all logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pretrain.ops.cross_entropy.linear_cross_entropy import linear_cross_entropy
from tests.helpers.relative_error import relative_error


def data(tokens, dim, vocab, dtype=torch.float64, scale=3.0):
    x = (scale * torch.randn(tokens, dim, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, torch.randint(vocab, (tokens,)), torch.randn(tokens)


@given(
    tokens=st.integers(1, 40),
    dim=st.integers(1, 12),
    vocab=st.integers(1, 30),
    at_once=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_equals_the_cross_entropy_of_all_logits(tokens, dim, vocab, at_once, seed):
    torch.manual_seed(seed)
    x, weight, targets, gradient = data(tokens, dim, vocab)
    expected = F.cross_entropy(x @ weight.t(), targets, reduction="none")
    wanted = torch.autograd.grad(expected, (x, weight), gradient.double())
    losses = linear_cross_entropy(x, weight, targets, tokens_at_once=at_once)
    found = torch.autograd.grad(losses, (x, weight), gradient.double())
    assert torch.allclose(losses, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_large_logits_and_bf16():
    x, weight, targets, gradient = data(64, 16, 50, torch.bfloat16, scale=30.0)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="none")
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    losses = linear_cross_entropy(x, weight, targets, tokens_at_once=5)
    assert losses.dtype == torch.float32
    assert bool(losses.isfinite().all())
    assert relative_error(losses, expected) < 2e-2
    for a, b in zip(torch.autograd.grad(losses, (x, weight), gradient), wanted, strict=True):
        assert relative_error(a, b) < 3e-2


def test_shapes_that_do_not_fit_are_named():
    x, weight, targets, _ = data(4, 3, 5)
    with pytest.raises(ValueError, match=r"targets are \(3,\), expected \(4,\)"):
        linear_cross_entropy(x, weight, targets[:3], tokens_at_once=2)
    with pytest.raises(ValueError, match=r"x is \(4, 2\) and weight \(5, 3\)"):
        linear_cross_entropy(x[:, :2], weight, targets, tokens_at_once=2)
    with pytest.raises(ValueError, match="tokens_at_once is 0"):
        linear_cross_entropy(x, weight, targets, tokens_at_once=0)


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
def test_liger(z_loss_weight):
    """Its kernel in the place of ours: losses, and gradients of tokens of different weight."""
    pytest.importorskip("liger_kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = (torch.randn(n, 16, device=device, requires_grad=True) for n in (13, 50))
    targets, of_tokens = torch.randint(0, 50, (13,), device=device), torch.rand(13, device=device)
    results = []
    for backend in ("chunked", "liger"):
        losses = linear_cross_entropy(
            x, weight, targets, tokens_at_once=5, z_loss_weight=z_loss_weight, backend=backend
        )
        gradients = torch.autograd.grad((losses * of_tokens).sum(), (x, weight))
        results.append([losses, *gradients])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-5


def test_liger_is_refused_where_it_does_not_fit():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="and has no softcap"):
        linear_cross_entropy(
            x, x, torch.zeros(3).long(), tokens_at_once=2, softcap=5.0, backend="liger"
        )
    with pytest.raises(ValueError, match="backend is 'fast', expected one of"):
        linear_cross_entropy(x, x, torch.zeros(3).long(), tokens_at_once=2, backend="fast")
