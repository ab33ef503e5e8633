"""S4 against dense linear algebra, its generating function, and the HiPPO matrix that it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.data.sequences import Sequences
from pretrain.nn.mixers import LayerContext, registry
from pretrain.nn.mixers.state_space import legs_modes
from pretrain.nn.parameters import fill_parameters
from pretrain.parallel.context import current_context
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error

HIDDEN, LENGTHS = 6, [5, 1, 17, 9]
pytestmark = pytest.mark.usefixtures("processes")


def build(*, moved=True, hidden=HIDDEN, **settings):
    kind = registry()["s4"]
    config = kind.config_class(**settings).resolve(hidden)
    layer: Any = kind(config, LayerContext(hidden, 0.3, 0.3, current_context(torch.float64)))
    fill_parameters(layer, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in ("B", "P", "A_log") if moved else ():  # at first all channels' are equal
            parameter = getattr(layer, name)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def conjugates(x):
    """All modes [d, N] of one of each pair."""
    return torch.cat([x, x.conj()], -1)


def system(layer):
    """A [d, N, N], B, C [d, N] over all modes, and Delta [d], complex."""
    spectrum = torch.complex(-layer.A_log.exp(), layer.A_imag)
    p, b, c = (conjugates(torch.complex(*x.unbind(-1))) for x in (layer.P, layer.B, layer.C))
    a = torch.diag_embed(conjugates(spectrum)) - p[:, :, None] * p.conj()[:, None]
    return a, b, c, layer.dt_log.exp()


def bilinear(a, b, step, alpha=0.5):
    """The sampled matrix and input, by LSSL's rule; the bilinear one at one half."""
    eye, step = torch.eye(a.shape[-1], dtype=a.dtype), step[:, None, None]
    inverse = torch.linalg.inv(eye - alpha * step * a)
    return inverse @ (eye + (1 - alpha) * step * a), (inverse @ (step * b[..., None]))[..., 0]


def definition(layer, x, lengths):
    """The layer over sequences x [T, d], each from a state of zeros."""
    a, b, c, step = system(layer)
    matrix, column = bilinear(a, b, step)
    u = x @ layer.u_proj.weight.T
    outputs, token = [], 0
    for length in lengths:
        state = torch.zeros_like(column)
        for now in u[token : token + length]:
            state = torch.einsum("dij,dj->di", matrix, state) + column * now[:, None]
            outputs.append((c * state).sum(-1).real + layer.D * now)
        token += length
    y = torch.stack(outputs) * F.silu(x @ layer.g_proj.weight.T)
    return y @ layer.o_proj.weight.T


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_outputs_and_gradients_are_those_of_the_equations(chunk_size):
    layer = build(state_size=8, chunk_size=chunk_size)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    found, _ = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = definition(layer, x, LENGTHS)
    assert relative_error(found[:, 0], expected) < 1e-10
    leaves = [x, *layer.parameters()]
    assert largest_error(found[:, 0], expected, leaves) < 1e-9


def test_the_response_to_an_impulse_is_that_of_the_generating_function():
    """The paper's algorithm: Cauchy products at the roots of unity, and an inverse FFT."""
    length = 50  # even: one root is -1, where the bilinear rule has its pole
    layer = build(state_size=8, chunk_size=16)
    u = torch.zeros(1, length, HIDDEN, dtype=torch.float64)
    u[:, 0] = 1
    found, _ = layer.run(u, None, None, final_state=False)

    a, b, c, step = system(layer)
    matrix, _ = bilinear(a, b, step)
    eye = torch.eye(8, dtype=a.dtype)
    c = (c[:, None] @ (eye - torch.linalg.matrix_power(matrix, length)))[:, 0]  # what it trains
    spectrum = conjugates(torch.complex(-layer.A_log.exp(), layer.A_imag))
    p = conjugates(torch.complex(*layer.P.unbind(-1)))
    roots = torch.exp(-2j * torch.pi * torch.arange(length // 2 + 1, dtype=torch.float64) / length)

    def cauchy(left, right):
        """2 / (1 + root) times the sum over modes of left right / (z - Delta Lambda)."""
        poles = 2 * (1 - roots) - (1 + roots) * (step[:, None] * spectrum)[..., None]
        return (2 * (step[:, None] * left * right)[..., None] / poles).sum(1)

    coupling = 1 + cauchy(p.conj(), p) * (1 + roots) / 2
    values = cauchy(c, b) - cauchy(c, p) * (1 + roots) / 2 * cauchy(p.conj(), b) / coupling
    expected = torch.fft.irfft(values, length)
    assert relative_error(found[0].T, expected) < 1e-10


@pytest.mark.parametrize("size", [2, 16])
def test_at_first_it_is_lssl_with_hippos_matrix(size):
    layer = build(state_size=size, moved=False)
    n = torch.arange(size, dtype=torch.float64)
    hippo = -torch.outer(2 * n + 1, 2 * n + 1).sqrt().tril(-1) - torch.diag(n + 1)
    inputs, p = torch.sqrt(2 * n + 1), torch.sqrt(n + 0.5)
    values, vectors = torch.linalg.eig(hippo + torch.outer(p, p))
    chosen = (values.imag > 0).nonzero()[:, 0]
    chosen = chosen[values.imag[chosen].argsort()]
    vectors = vectors[:, chosen] / vectors[:, chosen].norm(dim=0)
    phases = vectors.conj().T @ inputs.to(vectors.dtype)
    vectors = vectors * (phases / phases.abs())
    reads = torch.randn(HIDDEN, size, dtype=torch.float64)
    frequencies, b = legs_modes(size)
    with torch.no_grad():  # the parameters' own start is in float32
        layer.C.copy_(torch.view_as_real(reads.to(vectors.dtype) @ vectors))
        layer.A_log.fill_(0.5).log_()
        layer.A_imag.copy_(frequencies.expand_as(layer.A_imag))
        layer.B.copy_(torch.stack([b, 0 * b], -1).expand_as(layer.B))
        layer.P.copy_(layer.B * 0.5**0.5)
    u = torch.randn(1, 40, HIDDEN, dtype=torch.float64)
    found, _ = layer.run(u, None, None, final_state=False)
    matrix, column = bilinear(
        hippo.expand(HIDDEN, -1, -1), inputs.expand(HIDDEN, -1), layer.dt_log.exp()
    )
    state, expected = torch.zeros_like(column), []
    for now in u[0]:
        state = torch.einsum("dij,dj->di", matrix, state) + column * now[:, None]
        expected.append((reads * state).sum(-1))
    assert relative_error(found[0], torch.stack(expected)) < 1e-10


def test_many_tokens_in_float32_are_those_in_float64():
    layer = build(state_size=64, moved=False, hidden=8)
    u = torch.randn(1, 2000, 8, dtype=torch.float64)
    expected, _ = layer.run(u, None, None, final_state=False)
    found, _ = layer.float().run(u.float(), None, None, final_state=False)
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_size": 7}, "state_size is 7, expected an even number"),
        ({"chunk_size": 12}, "chunk_size is 12, expected a power of two"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    kind: Any = registry()["s4"]
    with pytest.raises(ValueError, match=message):
        kind.check(kind.config_class(**settings).resolve(HIDDEN), HIDDEN)
