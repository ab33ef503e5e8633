from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.ops import short_convolution
from tests.helpers.relative_error import relative_error


def torch_convolution(x, weight, dilation=1):
    history = (weight.shape[1] - 1) * dilation
    padded = F.pad(x.transpose(1, 2), (history, 0))
    y = F.conv1d(padded, weight[:, None], groups=x.shape[2], dilation=dilation)
    return y.transpose(1, 2)


@pytest.mark.parametrize(("width", "dilation"), [(1, 1), (2, 1), (4, 1), (3, 2), (2, 12)])
def test_equals_torch_on_rows(width, dilation):
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    found = short_convolution(x, weight, dilation=dilation)[0]
    expected = torch_convolution(x, weight, dilation)
    assert relative_error(found, expected) < 1e-14
    probe = torch.randn_like(x)
    for a, b in zip(
        torch.autograd.grad((found * probe).sum(), (x, weight)),
        torch.autograd.grad((expected * probe).sum(), (x, weight)),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-14


@pytest.mark.parametrize(
    ("lengths", "dilation"), [([5, 1, 0, 7], 1), ([1, 1, 1], 1), ([13], 1), ([5, 1, 0, 11], 3)]
)
def test_packed_equals_each_alone(lengths, dilation):
    x = torch.randn(1, sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    history = torch.randn(len(lengths), 3 * dilation, 3, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    y, state = short_convolution(
        x, weight, initial_state=history, cu_seqlens=cu_seqlens, dilation=dilation
    )
    parts, states = [], []
    for part, past in zip(x[0].split(lengths), history, strict=True):
        full = torch.cat([past, part])
        parts.append(torch_convolution(full[None], weight, dilation)[0, 3 * dilation :])
        states.append(full[len(part) :])
    assert relative_error(y[0], torch.cat(parts)) < 1e-14
    assert state is not None
    assert torch.equal(state, torch.stack(states))
    probe = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad((y * probe).sum(), (x, weight, history)),
        torch.autograd.grad((torch.cat(parts) * probe[0]).sum(), (x, weight, history)),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-13


def test_state_hands_over():
    x, weight, bias = torch.randn(2, 10, 3), torch.randn(3, 4), torch.randn(3)
    whole, final = short_convolution(x, weight, bias)
    first, state = short_convolution(x[:, :2], weight, bias)
    second, last = short_convolution(x[:, 2:], weight, bias, initial_state=state)
    assert torch.allclose(torch.cat([first, second], 1), whole)
    assert last is not None and final is not None
    assert torch.equal(last, final)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 4, 4, 10])], ids=["rows", "packed"])
def test_the_final_state_can_be_left_out(cu_seqlens):
    x, weight = torch.randn(1, 10, 3), torch.randn(3, 4)
    expected, _ = short_convolution(x, weight, cu_seqlens=cu_seqlens)
    y, state = short_convolution(x, weight, cu_seqlens=cu_seqlens, final_state=False)
    assert torch.equal(y, expected)
    assert state is None


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"weight is \(4, 4\), expected \(3, W\)"):
        short_convolution(torch.randn(1, 5, 3), torch.randn(4, 4))
