"""An input shared by projections: its gradients, their order, and what is kept for them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pretrain.config import ParallelConfig
from pretrain.model.language_model import LanguageModel
from pretrain.nn.parameters import fill_parameters
from pretrain.parallel import shared_input
from pretrain.parallel.context import current_context
from pretrain.parallel.processes import start_processes, stop_processes
from pretrain.parallel.shared_input import project, share_input
from tests.helpers.fake_processes import as_process
from tests.helpers.relative_error import relative_error
from tests.helpers.small_model import VOCAB
from tests.helpers.tensor_parallel_worker import cases

ONE = pytest.mark.usefixtures("processes")


@pytest.fixture
def without_groups():
    """Groups of other tests are gone for a while."""
    existed = dist.is_initialized()
    stop_processes()
    yield
    if existed:
        start_processes()


def layer(x, weights, whole, linear):
    """Two of three projections, one of them twice removed, and readers that are none."""
    first, second = linear(whole, weights[0], 0), linear(whole, weights[1], 1)
    rest = F.linear(whole, weights[1]) + (whole * x).sum(-1, keepdim=True)
    return first.tanh() @ first.transpose(-1, -2).sin() @ second + rest


def share(x, weights, sequence_parallel):
    group = dist.group.WORLD
    assert group is not None
    numbered = dict(enumerate(weights))
    return share_input(x, numbered, group, sequence_parallel=sequence_parallel)


def shared_layer(x, weights, sequence_parallel):
    whole = share(x, weights, sequence_parallel)
    return layer(x, weights, whole, project)


@ONE
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_gradients_are_those_of_plain_layers(sequence_parallel, recomputed, data):
    tokens, rows, d, out = (data.draw(st.integers(1, 9)) for _ in range(4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weights = draw(tokens, rows, d), [draw(out, d) for _ in range(3)]
    towards = draw(tokens, rows, out)

    def gradients(function):
        leaves = [t.clone().requires_grad_() for t in (x, *weights)]
        if recomputed:
            y = checkpoint(function, leaves[0], leaves[1:], use_reentrant=False)
        else:
            y = function(leaves[0], leaves[1:])
        y.backward(towards)
        return [y, *(leaf.grad for leaf in leaves)]

    found = gradients(lambda x, weights: shared_layer(x, weights, sequence_parallel))
    expected = gradients(
        lambda x, weights: layer(x, weights, x, lambda x, weight, _: F.linear(x, weight))
    )
    assert found[-1] is expected[-1] is None  # of the projection that did not follow
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        assert relative_error(a, b) < 1e-12


class _Log(TorchDispatchMode):
    """Products, and exchanges as they begin and as they are waited for."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.events: list[str] = []
        for name in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
            monkeypatch.setattr(shared_input.dist, name, self._begin(name))

    def _begin(self, name):
        log = self.events

        class Work:
            def wait(self):
                log.append(f"wait {name}")

        def begin(*tensors, group, async_op):
            assert async_op
            log.append(name)
            return Work()

        return begin

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "mm" in function.__name__:
            self.events.append("x".join(map(str, result.shape)))
        return result


@pytest.mark.usefixtures("without_groups")
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_exchanges_run_beside_products(sequence_parallel, monkeypatch):
    with as_process(0, 2, ParallelConfig(tensor=2)), _Log(monkeypatch) as log:
        x = torch.randn(6, 1, 5, requires_grad=True)
        weights = [torch.randn(out, 5, requires_grad=True) for out in (3, 4)]
        whole = share(x, weights, sequence_parallel)
        first, second = (project(whole, w, number) for number, w in enumerate(weights))
        assert first is not None
        assert second is not None
        log.events.clear()
        (first.sum() + second.sum()).backward()
    if not sequence_parallel:
        assert log.events == ["6x5", "6x5", "all_reduce", "4x5", "3x5", "wait all_reduce"]
        return
    assert log.events == [
        "all_gather_into_tensor",
        "12x5",
        "12x5",
        "reduce_scatter_tensor",
        "wait all_gather_into_tensor",
        "4x5",
        "3x5",
        "wait reduce_scatter_tensor",
    ]


@pytest.mark.usefixtures("without_groups")
@pytest.mark.parametrize("name", cases())
def test_no_layer_keeps_the_tokens_of_other_processes(name, monkeypatch):
    """Of a shared input, sequence parallelism keeps a process's own part for the backward pass."""
    gathered, kept = {}, {}  # by address, which is nobody else's as long as they are here
    full_input = shared_input._Gradients.full_input

    def noted(self, x):
        whole = full_input(self, x)
        gathered[whole.untyped_storage().data_ptr()] = whole
        return whole

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    monkeypatch.setattr(shared_input._Gradients, "full_input", noted)
    with as_process(0, 2, ParallelConfig(tensor=2, sequence=True)):
        context = current_context(torch.float32, sequence_parallel=True)
        model = LanguageModel(cases()[name], VOCAB, context)
        fill_parameters(model, seed=0)
        tokens = torch.zeros(1, 64, dtype=torch.int64)
        with saved_tensors_hooks(pack, lambda x: x):
            model(tokens, tokens)
    loop = model.recursion  # whose exits have a head each, behind the layers; these keep their own
    heads = 1 if loop is None or not loop.learns_exits else loop.num_passes()
    layers = [*gathered][:-heads]
    assert len(layers) >= len(model.blocks)
    assert not kept.keys() & set(layers)


def test_a_gradient_that_is_not_contiguous_is_summed_in_place_of_itself(monkeypatch):
    """megatron-core sums a copy of it, and returns what it was."""
    monkeypatch.setattr(shared_input.dist, "all_reduce", lambda tensor, group: tensor.mul_(2))
    parameter, group = torch.randn(3, 4, requires_grad=True), dist.group.WORLD
    given = torch.randn(4, 3).t()
    before = given.clone()
    shared_input.summed_gradient(parameter, group).backward(given)  # type: ignore[arg-type]
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, 2 * before)
    assert torch.equal(given, before)  # others may hold it too
