"""Float8 products against torchao's own layer, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.common.errors import UserError
from pretrain.ops import float8
from pretrain.ops.float8 import Float8, check_float8, float8_linear, products
from tests.helpers.relative_error import relative_error

pytest.importorskip("torchao")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("sharded", ["inputs", "outputs"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_it_equals_the_layer_of_torchao(sharded, scale):
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    torch.manual_seed(0)
    x = (scale * torch.randn(5, 16, 32)).bfloat16().to(DEVICE).requires_grad_()
    weight = torch.randn(48, 32).bfloat16().to(DEVICE).requires_grad_()
    grad = torch.randn(5, 16, 48).bfloat16().to(DEVICE)
    theirs = torch.nn.Linear(32, 48, bias=False, dtype=torch.bfloat16)
    theirs.weight = torch.nn.Parameter(weight.detach().clone())
    layer = Float8Linear.from_float(theirs, Float8LinearConfig(emulate=DEVICE == "cpu"))
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


def seen_products(monkeypatch, d_in):
    """Results and gradients of a layer, and the operands of its three products."""
    plain, seen = products._product, []

    def noted(a, b):
        seen.append((a, b))
        return plain(a, b)

    torch.manual_seed(0)
    x = torch.randn(7, 16, d_in).bfloat16().requires_grad_()
    weight = torch.randn(48, d_in).bfloat16().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(products, "_product", noted)
        y = float8_linear(x, weight, Float8("outputs"))
        y.backward(torch.randn(7, 16, 48).bfloat16())
    assert x.grad is not None
    assert weight.grad is not None
    return seen, [y.flatten(0, -2), x.grad.flatten(0, -2), weight.grad]


def test_torchs_own_product_equals_the_emulation(monkeypatch):
    """The operation that runs on a GPU, which torch has on a CPU too."""
    seen, expected = seen_products(monkeypatch, 32)
    emulated = products._tensor

    def real(operand):
        tensor: Any = emulated(operand)
        each = [part._replace(emulate=False) for part in tensor._linear_mm_config]
        tensor._linear_mm_config = type(tensor._linear_mm_config)(*each)
        return tensor

    monkeypatch.setattr(products, "_tensor", real)
    for operands, wanted in zip(seen, expected, strict=True):
        assert relative_error(products._product(*operands), wanted) < 2.0**-8


@pytest.mark.parametrize("d_in", [32, 40])
def test_a_gpu_takes_the_products_of_multiples_of_16(monkeypatch, d_in):
    """By torch's checks of shapes and layouts for CUDA tensors without memory."""
    seen, expected = seen_products(monkeypatch, d_in)
    for (a, b), wanted in zip(seen, expected, strict=True):
        assert not b.data.is_contiguous()  # by columns already: no copy is made
        a = a._replace(data=a.data.contiguous())  # as torchao makes it
        with FakeTensorMode():
            for_gpu = [
                operand._replace(
                    data=torch.empty_strided(
                        operand.data.shape,
                        operand.data.stride(),
                        dtype=operand.data.dtype,
                        device="cuda",
                    ),
                    scale=torch.ones((), device="cuda"),
                )
                for operand in (a, b)
            ]
            if any(width % 16 for width in b.data.shape):
                with pytest.raises(RuntimeError, match="divisible by 16"):
                    products._product(*for_gpu)
                continue
            found = products._product(*for_gpu)
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["INPUT", "GRAD_OUTPUT"])
def test_compiled_casts_have_the_same_bits(role):
    """As GPUs run them; here by torch.compile's CPU compiler."""
    x, dtype = torch.randn(48, 32).bfloat16(), products._DTYPES[role]
    with torch.no_grad():
        largest = products._largest(x)
        scale = products._scale(largest[None], dtype)[0]
        cases: list[tuple[Any, tuple[Any, ...]]] = [
            (products._largest, (x,)),
            (products._scale, (largest[None], dtype)),
            (products._to_float8, (x, scale, dtype)),
            (products._to_float8_by_columns, (x, scale, dtype)),
        ]
        for function, given in cases:
            expected, found = function(*given), function.compiled(*given)
            assert torch.equal(found.float(), expected.float())
            assert found.stride() == expected.stride()


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
