"""S4D against its differential equation, sampled by dense linear algebra in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.config import OptimizerConfig
from pretrain.data.sequences import Sequences
from pretrain.model.build import build_model
from pretrain.nn.mixers import registry
from pretrain.nn.mixers.state_space import legs_modes
from pretrain.training.engine import Engine
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error, small_layer
from tests.helpers.small_model import VOCAB, settings
from tests.helpers.small_training import batches

HIDDEN, LENGTHS = 6, [5, 1, 17, 9]
pytestmark = pytest.mark.usefixtures("processes")


def build(**settings):
    layer = small_layer("s4d", HIDDEN, **settings)
    return layer


def sampled(layer, discretization):
    """Matrices [d, 2M, 2M], columns and rows [d, 2M] of the system in real numbers."""
    re, im = -layer.A_log.exp(), layer.A_imag
    blocks = torch.stack([torch.stack([re, -im], -1), torch.stack([im, re], -1)], -2)
    matrix = torch.stack([torch.block_diag(*channel) for channel in blocks])
    column, row = layer.B.flatten(1), (layer.C * torch.tensor([2.0, -2.0])).flatten(1)
    step, eye = layer.dt_log.exp()[:, None, None], torch.eye(column.shape[1]).double()
    if discretization == "zoh":
        # One exponential has both: inputs are a constant row of the system.
        zeros = torch.zeros_like(matrix[:, :1])
        both = torch.cat([torch.cat([matrix, column[..., None]], 2), F.pad(zeros, (0, 1))], 1)
        both = torch.linalg.matrix_exp(step * both)
        return both[:, :-1, :-1], both[:, :-1, -1], row
    inverse = torch.linalg.inv(eye - step / 2 * matrix)
    return inverse @ (eye + step / 2 * matrix), (inverse @ (step * column[..., None]))[..., 0], row


def definition(layer, x, lengths):
    """The layer over sequences x [T, d], each from a state of zeros."""
    config = layer.config
    matrix, column, row = sampled(layer, config.discretization)
    u = x @ layer.u_proj.weight.T if config.output == "gated" else x
    outputs, token = [], 0
    for length in lengths:
        state = torch.zeros_like(column)
        for now in u[token : token + length]:
            state = torch.einsum("dij,dj->di", matrix, state) + column * now[:, None]
            outputs.append((row * state).sum(-1) + layer.D * now)
        token += length
    y = torch.stack(outputs)
    if config.output == "gated":
        return (y * F.silu(x @ layer.g_proj.weight.T)) @ layer.o_proj.weight.T
    left, right = (F.gelu(y) @ layer.o_proj.weight.T).chunk(2, -1)
    return left * torch.sigmoid(right)


@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("output", ["gated", "glu"])
def test_outputs_and_gradients_are_those_of_the_equations(init, discretization, output):
    layer = build(
        state_size=8, init=init, discretization=discretization, output=output, chunk_size=4
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # the start's B is real, and A's real parts are equal
        layer.B.add_(0.3 * torch.randn(layer.B.shape, generator=generator))
        layer.A_log.add_(0.3 * torch.randn(layer.A_log.shape, generator=generator))
    x = torch.randn(sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    found, _ = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = definition(layer, x, LENGTHS)
    assert relative_error(found[:, 0], expected) < 1e-10
    leaves = [x, *layer.parameters()]
    assert largest_error(found[:, 0], expected, leaves) < 1e-9


def test_held_inputs_at_half_the_step_are_the_same_system():
    layer = build(state_size=8)
    u = torch.randn(1, 20, HIDDEN, dtype=torch.float64)
    expected, last = layer.run(u, None, None, final_state=True)
    with torch.no_grad():
        layer.dt_log.sub_(math.log(2))
    found, state = layer.run(u.repeat_interleave(2, 1), None, None, final_state=True)
    assert relative_error(found[:, 1::2], expected) < 1e-12
    assert relative_error(state, last) < 1e-12


def test_real_modes_are_averages():
    """Without frequencies a mode is an average whose weights fall by e^(Delta Re A) a token."""
    layer = build(state_size=2, discretization="zoh")
    with torch.no_grad():
        layer.A_imag.zero_()
        layer.C.copy_(torch.tensor([0.5, 0.0]).expand_as(layer.C))
    u = torch.ones(1, 3000, HIDDEN, dtype=torch.float64)
    y, _ = layer.run(u, None, None, final_state=False)
    rate = layer.A_log.exp()[:, 0]
    decayed = torch.exp(-rate * layer.dt_log.exp() * torch.arange(1, 3001)[:, None])
    expected = (1 - decayed) / rate  # of ones
    assert relative_error(y[0], expected) < 1e-10


def test_legs_is_hippos_normal_part():
    size = 16
    n = torch.arange(size, dtype=torch.float64)
    p = torch.sqrt(n + 0.5)
    hippo = -torch.outer(2 * n + 1, 2 * n + 1).sqrt().tril(-1) - torch.diag(n + 1)
    normal = hippo + torch.outer(p, p)
    frequencies, inputs = legs_modes(size)
    found = torch.linalg.eigvals(normal)
    assert relative_error(found.real, torch.full_like(found.real, -0.5)) < 1e-10
    imaginary = found.imag[found.imag > 0].sort().values
    assert relative_error(frequencies, imaginary) < 1e-10
    # What the modes make of an impulse, seen through B, is what the matrix makes of it.
    b = torch.sqrt(2 * n + 1)
    steps = torch.linspace(0, 2, 9, dtype=torch.float64)
    expected = torch.stack([b @ torch.linalg.matrix_exp(t * normal) @ b for t in steps])
    modes = torch.exp(
        steps[:, None] * torch.complex(torch.full_like(frequencies, -0.5), frequencies)
    )
    assert relative_error(2 * (modes * inputs.square()).real.sum(-1), expected) < 1e-10


def test_an_odd_number_of_states_is_refused():
    kind: Any = registry()["s4d"]
    with pytest.raises(ValueError, match="state_size is 7, expected an even number"):
        kind.check(kind.config_class(state_size=7), HIDDEN)


@pytest.mark.parametrize("kind", ["s4d", "s4"])
def test_the_system_learns_no_faster_than_its_limit(kind):
    """Adam's first step moves every element by the learning rate."""
    moved = {}
    for limit in (None, 1e-3, 1.0):
        mixers = {kind: {"state_size": 4, "chunk_size": 8, "max_dynamics_lr": limit}}
        config = settings(pattern=kind, mixers=mixers)
        model = build_model(config, VOCAB, seed=0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        engine = Engine(model, OptimizerConfig(lr=1e-2, weight_decay=0.0, clip_grad=0.0))
        engine.train_step(batches(0), 1e-2 / 2)  # halfway up the schedule
        moved[limit] = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters()}
    system = {"A_log", "A_imag", "B", "dt_log", *(["P"] if kind == "s4" else [])}
    for name, distance in moved[1e-3].items():
        expected = 1e-3 if name.rsplit(".", 1)[-1] in system else 1e-2
        assert distance == pytest.approx(expected / 2, rel=2e-2), name
        assert moved[None][name] == moved[1.0][name] == pytest.approx(1e-2 / 2, rel=2e-2), name
