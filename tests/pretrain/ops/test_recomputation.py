"""Cheap results are computed once more in the backward pass, never twice, and are not kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.ops.elementwise.gating import swiglu
from pretrain.ops.shared.recomputation import recomputed, recomputing
from tests.helpers.relative_error import relative_error


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def inputs(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 6, generator=generator).requires_grad_() for _ in range(count)]


def test_three_users_and_what_is_inside_share_one_run_which_is_freed():
    """Views too: the second product has the transpose, the third a part."""
    x, a, b = inputs(3)
    plain = torch.tanh(x).exp()
    expected = (plain @ a) * (plain.t() @ b) + (plain[1:5, :4] @ a[:4]).sum()
    function = Counted(lambda t: torch.tanh(t).exp())
    with recomputing():
        y = recomputed(function, x)
        memory = torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage())
        z = (y @ a) * (y.t() @ b) + (y[1:5, :4] @ a[:4]).sum()
        del y
    assert memory.expired()
    gradients = torch.autograd.grad(z.sum(), (x, a, b))
    assert function.calls == 2
    for found, plain in zip(gradients, torch.autograd.grad(expected.sum(), (x, a, b)), strict=True):
        assert torch.equal(found, plain)


def test_a_chain_runs_every_function_once_more():
    x, weight = inputs(2)
    functions = [Counted(torch.tanh), Counted(F.silu), Counted(torch.sigmoid)]
    with recomputing():
        y = x
        for function in functions:
            y = recomputed(function, y)
        z = (y @ weight).sum()
    gradient = torch.autograd.grad(z, x)
    assert [function.calls for function in functions] == [2, 2, 2]
    expected = (torch.sigmoid(F.silu(torch.tanh(x))) @ weight).sum()
    assert torch.equal(*gradient, *torch.autograd.grad(expected, x))


def test_a_result_is_kept_where_its_input_would_take_as_much():
    x, weight = inputs(2)
    double = Counted(lambda t: 2 * t)  # whose gradient needs nothing of x
    with recomputing():
        z = recomputed(double, x @ weight) @ weight
    z.sum().backward()
    assert double.calls == 1


def test_a_second_backward_pass():
    x, weight = inputs(2)
    with recomputing():
        z = (recomputed(F.silu, x) @ weight).sum()
    first = torch.autograd.grad(z, (x, weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(z, (x, weight))))


def test_a_change_in_place_is_noticed():
    x, weight = inputs(2)
    with recomputing():
        wide = x * 1
        z = (recomputed(F.silu, wide) @ weight).sum()
    with torch.no_grad():
        wide.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        z.backward()


def test_a_changed_result_is_kept_as_it_is():
    x, weight = inputs(2)
    with recomputing():
        y = recomputed(F.silu, x)
        y.mul_(3)
        z = (y @ weight).sum()
    expected = ((F.silu(x) * 3) @ weight).sum()
    found = torch.autograd.grad(z, (x, weight))
    assert all(map(torch.equal, found, torch.autograd.grad(expected, (x, weight))))


def test_a_function_that_differs_the_second_time_is_reported():
    x, weight = inputs(2)
    sizes = iter((1, 2))
    with recomputing():
        z = recomputed(lambda t: torch.tanh(t).repeat(next(sizes), 1).exp(), x) @ weight
    with pytest.raises(RuntimeError, match="made other tensors"):
        z.sum().backward()


def test_autocast_is_that_of_the_forward_pass():
    x, weight = inputs(2)

    def function(t):
        return (t @ t).exp()

    found = []
    for run in (lambda f, t: f(t), recomputed):
        with torch.autocast("cpu", torch.bfloat16), recomputing():
            z = run(function, x) @ weight
        found.append(torch.autograd.grad(z.float().sum(), (x, weight)))
    assert all(map(torch.equal, *found))


def test_without_gradients_and_outside_nothing_is_marked():
    (x,) = inputs(1)
    plain = recomputed(F.silu, x)
    with torch.no_grad(), recomputing():
        silent = recomputed(F.silu, x)
    with recomputing():
        marked = recomputed(F.silu, x)
    assert [hasattr(y.untyped_storage(), "recipe") for y in (plain, silent, marked)] == [
        False,
        False,
        True,
    ]


@pytest.mark.slow
def test_compiled_functions():
    """As on a GPU: what the compiled backward pass keeps are the inputs, whatever the length."""
    compiled: Any = swiglu
    for length in (5, 9, 5):
        gate, up, weight = (t[:length].detach().requires_grad_() for t in torch.randn(3, 9, 9))
        gradients = []
        for scope, run in ((torch.enable_grad, swiglu), (recomputing, compiled.compiled)):
            with scope():
                y = recomputed(run, gate, up) @ weight.t()
            gradients.append(torch.autograd.grad(y.square().sum(), (gate, up, weight)))
        for found, expected in zip(*gradients, strict=True):
            assert relative_error(found, expected) < 1e-5


def test_a_parameter_may_lose_its_memory_until_the_backward_pass():
    """As DeepSpeed's ZeRO-3 does; what a call needs of it is kept."""
    x, weight = inputs(2)
    scale, values = weight[0].detach().clone().requires_grad_(), weight.detach().clone()
    expected = torch.autograd.grad((torch.tanh(x * scale) * weight).sum(), (x, scale, weight))
    with recomputing([scale, weight]):
        z = (recomputed(lambda t, s: torch.tanh(t * s), x, scale) * weight).sum()
    memory = torch.multiprocessing.reductions.StorageWeakRef(weight.untyped_storage())
    for parameter in (scale, weight):
        parameter.data = torch.empty(0)
    assert memory.expired()
    weight.data = values
    scale.data = scale.new_empty(6)
    found = torch.autograd.grad(z, (x, scale, weight))
    assert all(map(torch.equal, found, expected))
