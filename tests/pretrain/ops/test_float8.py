"""Float8 products against torchao's own layer, and what is refused."""

from __future__ import annotations

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.ops import float8
from pretrain.ops.float8 import Float8, check_float8, float8_linear
from tests.helpers.relative_error import relative_error

pytest.importorskip("torchao")


@pytest.mark.parametrize("sharded", ["inputs", "outputs"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_it_equals_the_layer_of_torchao(sharded, scale):
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    torch.manual_seed(0)
    x = (scale * torch.randn(5, 16, 32)).bfloat16().requires_grad_()
    weight = torch.randn(48, 32).bfloat16().requires_grad_()
    grad = torch.randn(5, 16, 48).bfloat16()
    theirs = torch.nn.Linear(32, 48, bias=False, dtype=torch.bfloat16)
    theirs.weight = torch.nn.Parameter(weight.detach().clone())
    layer = Float8Linear.from_float(theirs, Float8LinearConfig(emulate=True))
    other = x.detach().clone().requires_grad_()
    expected = layer(other)
    expected.backward(grad)
    found = float8_linear(x, weight, Float8(sharded))
    found.backward(grad)
    assert torch.equal(found, expected)
    assert x.grad is not None
    assert weight.grad is not None
    assert torch.equal(x.grad, other.grad)
    assert torch.equal(weight.grad, layer.weight.grad)
    exact = torch.nn.functional.linear(x, weight)
    assert 0 < relative_error(found, exact) < 0.05


def test_zeros_and_what_is_not_finite_stay():
    weight = torch.ones(16, 16).bfloat16()
    assert not float8_linear(torch.zeros(16, 16).bfloat16(), weight, Float8("outputs")).any()
    for value in (torch.inf, torch.nan):
        x = torch.zeros(16, 16).bfloat16()
        x[3, 4] = value
        assert not float8_linear(x, weight, Float8("outputs"))[3].isfinite().any()


def test_without_torchao_the_extra_is_named(monkeypatch):
    found = float8.requirements.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "torchao" else found(name)
    )
    with pytest.raises(UserError, match=r"^train.precision is fp8, .*hybrid-pretrain\[fp8\]"):
        check_float8()


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_a_gpu_without_float8_is_refused(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if capability >= (8, 9):
        check_float8()
        return
    with pytest.raises(UserError, match=r"^train.precision is fp8, but NVIDIA A100 of .* 8\.0 has"):
        check_float8()
