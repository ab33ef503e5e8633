"""flash-linear-attention's kernels behind our ops, against our definitions: in Triton's interpreter
in float16, on a GPU in bfloat16. Gradients, documents, starting states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.ops import (
    comba,
    delta_rule,
    diagonal_scan,
    dplr,
    gdn2,
    linear_attention,
    mesa,
    short_convolution,
)
from tests.helpers.fla_interpreter import make_interpretable
from tests.helpers.relative_error import relative_error

pytest.importorskip("fla")
triton = pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE, NARROW = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float16)
TOLERANCE = 3e-2 if ON_GPU else 2e-3
pytestmark = pytest.mark.filterwarnings("ignore:Triton is not supported")
HEADS, KEY, VALUE, LENGTHS = 2, 32, 16, (70, 1, 23)  # more than a chunk of 64


@pytest.fixture(autouse=True, scope="module")
def interpretable():
    if ON_GPU:
        yield
        return
    import fla.ops.comba
    import fla.ops.gated_delta_product
    import fla.ops.gdn2
    import fla.ops.generalized_delta_rule
    import fla.ops.gla
    import fla.ops.hgrn
    import fla.ops.kda
    import fla.ops.mesa_net.chunk
    import fla.ops.simple_gla

    patch = pytest.MonkeyPatch()
    make_interpretable(patch)
    # Of the states that this kernel stores in bfloat16 the interpreter makes numbers of 16 bits.
    states = fla.ops.mesa_net.chunk.chunk_mesa_fwd_h
    patch.setattr(
        fla.ops.mesa_net.chunk,
        "chunk_mesa_fwd_h",
        lambda **given: states(**{**given, "states_in_fp32": True}),
    )
    yield
    patch.undo()


def narrow(*shape):
    return torch.randn(shape, device=DEVICE).to(NARROW)


def keys(steps=1):
    k = torch.randn(1, steps * sum(LENGTHS), HEADS, KEY, device=DEVICE)
    return F.normalize(k, dim=-1).to(NARROW)


def compare(run, definition, tensors, tolerance=TOLERANCE):
    """run(backend, *tensors): the definition in float64, fla in what the tensors have."""
    results = []
    for backend in (definition, "fla"):
        wide = backend != "fla"
        inputs = [(t.double() if wide else t).detach().requires_grad_() for t in tensors]
        outputs = run(backend, *inputs)
        generator = torch.Generator(DEVICE).manual_seed(1)
        loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for output in outputs:
            weights = torch.randn(output.shape, generator=generator, device=DEVICE)
            loss = loss + (output.double() * weights).sum()
        gradients = torch.autograd.grad(loss, inputs)
        results.append([*outputs, *gradients])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found.double(), expected) < tolerance


def starts():
    return torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("steps", [1, 2])
def test_delta_rule(decay, steps):
    if decay == "channel" and steps > 1:
        x = narrow(1, 4, 1, 16)
        with pytest.raises(ValueError, match="no decay per channel with num_householder 2"):
            delta_rule(
                x,
                narrow(1, 8, 1, 16),
                narrow(1, 8, 1, 16),
                narrow(1, 8, 1),
                backend="fla",
                log_decay=-x.float().abs(),
                num_householder=2,
            )
        return
    total = sum(LENGTHS)
    q, k, v = narrow(1, total, HEADS, KEY), keys(steps), narrow(1, steps * total, HEADS, VALUE)
    beta = torch.rand(1, steps * total, HEADS, device=DEVICE).to(NARROW)
    state = torch.randn(len(LENGTHS), HEADS, KEY, VALUE, device=DEVICE)
    tensors = [q, k, v, beta, state]
    if decay != "none":
        tensors.append(-torch.rand(q.shape[: 3 if decay == "head" else 4], device=DEVICE))

    def run(backend, q, k, v, beta, state, log_decay=None):
        return delta_rule(
            q,
            k,
            v,
            beta,
            log_decay=log_decay,
            num_householder=steps,
            initial_state=state,
            cu_seqlens=starts(),
            backend=backend,
        )

    compare(run, "recurrent", tensors)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_linear_attention(decay):
    total = sum(LENGTHS)
    q, k, v = narrow(1, total, HEADS, KEY), keys(), narrow(1, total, HEADS, VALUE)
    tensors = [q, k, v, torch.randn(len(LENGTHS), HEADS, KEY, VALUE, device=DEVICE)]
    if decay != "none":
        tensors.append(-torch.rand(q.shape[: 3 if decay == "head" else 4], device=DEVICE))

    def run(backend, q, k, v, state, log_decay=None):
        return linear_attention(
            q, k, v, log_decay=log_decay, initial_state=state, cu_seqlens=starts(), backend=backend
        )

    compare(run, "recurrent", tensors)


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(
            "dplr", marks=pytest.mark.skipif(not ON_GPU, reason="the interpreter cannot run it")
        ),
        "dplr bounded",
        pytest.param("gdn2", marks=pytest.mark.slow),
        "comba",
    ],
)
def test_low_rank(op):
    total = sum(LENGTHS)
    q, v = narrow(1, total, HEADS, KEY), narrow(1, total, HEADS, VALUE)
    state = torch.randn(len(LENGTHS), HEADS, KEY, VALUE, device=DEVICE)
    log_decay = -0.6 * torch.rand(q.shape[: 3 if op == "comba" else 4], device=DEVICE)
    gates = [torch.rand(x.shape, device=DEVICE).to(NARROW) for x in (q, v, q[..., 0])]
    others = {"dplr": [-keys(), keys()], "gdn2": gates[:2], "comba": [keys(), gates[2]]}

    def run(backend, q, k, v, first, second, state, log_decay):
        function: Any = {"gdn2": gdn2, "comba": comba}.get(op, dplr)
        options = {"lower_bound": -0.61} if op == "dplr bounded" else {}
        return function(
            q,
            k,
            v,
            first,
            second,
            log_decay=log_decay,
            initial_state=state,
            cu_seqlens=starts(),
            backend=backend,
            **options,
        )

    compare(run, "recurrent", [q, keys(), v, *others[op.split()[0]], state, log_decay])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_short_convolution(packed, started):
    batch, cu_seqlens = (1, starts()) if packed else (2, None)
    x, weight, bias = narrow(batch, sum(LENGTHS), 24), narrow(24, 4), narrow(24)
    tensors = [x, weight, bias]
    if started:
        tensors.append(narrow(len(LENGTHS) if packed else batch, 3, 24))

    def run(backend, x, weight, bias, state=None):
        return short_convolution(
            x,
            weight,
            bias,
            activation="silu",
            initial_state=state,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )

    compare(run, "taps", tensors)


@pytest.mark.parametrize("lengths", [LENGTHS, (0, 5, 0)])
def test_diagonal_scan(lengths):
    """Where it is asked for; it takes float32, and bfloat16 as such."""
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    x, log_decay = torch.randn(2, 1, sum(lengths), 40, device=DEVICE)
    state = torch.randn(len(lengths), 40, device=DEVICE)

    def run(backend, x, log_decay, state):
        return diagonal_scan(None, x, state, ends, log_decay=log_decay, backend=backend)

    compare(run, "sequential", [x, -log_decay.abs(), state])
    narrow = diagonal_scan(None, x.to(NARROW), log_decay=-log_decay.abs(), backend="fla")
    assert (narrow[0].dtype, narrow[1].dtype) == (NARROW, torch.float32)


def test_rows_need_no_cu_seqlens():
    q, k, v = narrow(2, 9, 1, 16), F.normalize(narrow(2, 9, 1, 16), dim=-1), narrow(2, 9, 1, 16)
    beta = torch.rand(2, 9, 1, device=DEVICE).to(NARROW)
    compare(lambda b, *t: delta_rule(*t, backend=b), "recurrent", [q, k, v, beta])


def test_what_it_does_not_take_is_said():
    x = torch.zeros(1, 4, 1, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"takes bfloat16 or float16, found torch\.float32"):
        linear_attention(x, x, x, backend="fla")
    wide = torch.zeros(1, 4, 1, 512, dtype=NARROW, device=DEVICE)
    with pytest.raises(ValueError, match="keys of at most 256 channels, found 512"):
        linear_attention(wide, wide, wide, backend="fla")
    a = torch.rand(1, 4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="diagonal_scan: backend 'fla' takes log_decay, found a"):
        diagonal_scan(a, a, backend="fla")
    with pytest.raises(ValueError, match="computes in float32, which"):
        diagonal_scan(None, a.double(), log_decay=-a.double(), backend="fla")


def test_mesa():
    total, dim = sum(LENGTHS), 32
    q, k, v = keys(), keys(), narrow(1, total, HEADS, dim)
    beta = torch.rand(1, total, HEADS, device=DEVICE)
    ridge = 0.25 + torch.rand(HEADS, dim, device=DEVICE)
    log_decay = -torch.rand(1, total, HEADS, device=DEVICE)
    count = len(LENGTHS)
    root = torch.randn(count, HEADS, dim, dim, device=DEVICE) * 0.2
    state = torch.randn(count, HEADS, dim, dim, device=DEVICE)
    tensors = [q, k, v, beta, ridge, log_decay, root @ root.mT, state]

    def run(backend, q, k, v, beta, ridge, log_decay, covariance, state):
        y, ends = mesa(
            q,
            k,
            v,
            beta,
            ridge,
            log_decay=log_decay,
            initial_state=((covariance + covariance.mT) / 2, state),
            cu_seqlens=starts(),
            backend=backend,
            iterations=12,
        )
        return y, *ends

    compare(run, "recurrent", tensors, 3e-2 if ON_GPU else 1e-2)  # solutions are in float16


def test_mesa_of_other_widths_is_refused():
    q, v = narrow(1, 4, 1, 16), narrow(1, 4, 1, 8)
    gates = torch.rand(2, 1, 4, 1, device=DEVICE)
    with pytest.raises(ValueError, match="one width of at most 128, found 16 and 8"):
        ridge = torch.ones(1, 16, device=DEVICE)
        mesa(q, q, v, gates[0], ridge, log_decay=-gates[1], backend="fla")
