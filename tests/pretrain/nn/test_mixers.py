"""What every mixer of the registry must do. A new mixer is tested by being registered."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pretrain.data.sequences import Sequences
from pretrain.nn.mixers import LayerContext, registry
from pretrain.nn.mixers.base import without_states
from pretrain.nn.parameters import fill_parameters
from pretrain.ops import definitions
from pretrain.ops.shared import arguments
from pretrain.parallel.context import current_context
from tests.helpers.relative_error import relative_error
from tests.helpers.small_mixers import SMALL

HIDDEN = 24
CASES = [
    pytest.param(name, settings, id=f"{name}-{i}")
    for name in registry()
    for i, settings in enumerate(SMALL.get(name, [{}]))
]
pytestmark = pytest.mark.usefixtures("processes")


def build(name, settings, dtype=torch.float64):
    mixer = registry()[name]
    config = mixer.config_class(**settings).resolve(HIDDEN)
    mixer.check(config, HIDDEN)
    layer = mixer(config, LayerContext(HIDDEN, 0.3, 0.3, current_context(dtype)))
    fill_parameters(layer, seed=1)
    return layer


def close(found, expected):
    for key in expected:
        assert relative_error(found[key], expected[key]) < 1e-10, key


def gradients_of(layer, x, sequences):
    """Output, final state and all gradients of a weighted sum of both."""
    x = x.clone().requires_grad_()
    y, state = layer(x, sequences=sequences)
    floating = {k: t for k, t in state.items() if t.is_floating_point()}
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=x.dtype)
    for t in [y, *floating.values()]:
        weights = torch.randn(t.shape, generator=generator, dtype=t.dtype)
        total = total + (t.masked_fill(t.isinf(), 0) * weights).sum()
    names = ["input", *(name for name, _ in layer.named_parameters())]
    found = torch.autograd.grad(
        total, [x, *layer.parameters()], allow_unused=True, materialize_grads=True
    )
    return {"output": y, **state, **dict(zip(names, found, strict=True))}


@pytest.mark.parametrize(("name", "settings"), CASES)
@settings_of_hypothesis(max_examples=3)
@example([700], 0)
@example([1], 0)
@example([0, 3, 0], 0)
@given(st.lists(st.integers(0, 175), min_size=1, max_size=4), st.integers(0, 1000))
def test_fast_form_equals_definition(name, settings, lengths, seed):
    layer = build(name, settings)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), 1, HIDDEN, dtype=torch.float64, generator=generator)
    sequences = Sequences.from_lengths(lengths)
    found = gradients_of(layer, x, sequences)
    with definitions():
        expected = gradients_of(layer, x, sequences)
    for key, value in expected.items():
        assert relative_error(found[key], value) < 1e-10, key


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("length", [1, 2, 37])
def test_one_pass_equals_two_halves_and_single_steps(name, settings, length):
    layer = build(name, settings)
    x = torch.randn(length, 3, HIDDEN, dtype=torch.float64)
    whole, final = layer(x)
    cut = length // 2
    first, state = layer(x[:cut])
    second, last = layer(x[cut:], state=state)
    assert relative_error(torch.cat([first, second]), whole) < 1e-10
    close(last, final)
    state, steps = layer.init_state(3), []
    for token in x:
        y, state = layer.step(token, state)
        steps.append(y)
    assert relative_error(torch.stack(steps), whole) < 1e-10
    close(state, final)


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("lengths", [None, [5, 1, 19, 12]], ids=str)
def test_an_output_whose_state_nobody_reads_is_the_same(name, settings, lengths):
    """To the bit, with its gradients; the state may lack entries."""
    layer = build(name, settings)
    x = torch.randn(37, 1 if lengths else 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    sequences = None if lengths is None else Sequences.from_lengths(lengths)

    def run():
        y, state = layer(x, sequences=sequences)
        return y, state, torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])

    y, state, gradients = run()
    with without_states():
        found, rest, found_gradients = run()
    assert torch.equal(found, y)
    assert all(torch.equal(a, b) for a, b in zip(found_gradients, gradients, strict=True))
    assert rest.keys() <= state.keys()
    assert not any("conv" in key or key in "kv" for key in rest)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_states_are_joined_as_they_are_selected(name, settings):
    layer = build(name, settings)
    x = torch.randn(37, 1, HIDDEN, dtype=torch.float64)
    _, state = layer(x, sequences=Sequences.from_lengths([5, 1, 19, 12]))
    order = [2, 3, 0, 2]
    alone = [layer.select_state(state, torch.tensor([number])) for number in order]
    wanted = layer.select_state(state, torch.tensor(order))
    joined = layer.join_states([layer.join_states(alone[:1]), layer.join_states(alone[1:])])
    assert joined.keys() == wanted.keys()
    for key, values in wanted.items():
        assert torch.equal(joined[key], values), key


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_packed_sequences_equal_each_alone(name, settings):
    layer = build(name, settings)
    lengths = [5, 1, 19, 12]
    x = torch.randn(sum(lengths), 1, HIDDEN, dtype=torch.float64, requires_grad=True)
    sequences = Sequences.from_lengths(lengths)
    y, _ = layer(x, sequences=sequences)
    alone = torch.cat([layer(part)[0] for part in x.split(lengths)])
    assert relative_error(y, alone) < 1e-10
    parameters = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), parameters),
        torch.autograd.grad(alone.square().sum(), parameters),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-9


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_document_never_feels_its_neighbour(name, settings):
    layer = build(name, settings, torch.float32)
    sequences = Sequences(torch.tensor([0, 11, 30, 34]))
    x = torch.randn(34, 1, HIDDEN)
    changed = x.clone()
    changed[:11] = torch.randn(11, 1, HIDDEN)
    changed[30:] *= -2
    outputs, gradients = [], []
    for case in (x, changed):
        case = case.clone().requires_grad_()
        y, _ = layer(case, sequences=sequences)
        outputs.append(y[11:30])
        (gradient,) = torch.autograd.grad(y[11:30].square().sum(), case)
        gradients.append(gradient[11:30])
        assert bool((gradient[:11] == 0).all())
        assert bool((gradient[30:] == 0).all())
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_training_after_inference_on_the_same_documents(name, settings):
    """What is derived from sequences under inference_mode serves training as well."""
    layer = build(name, settings)
    sequences = Sequences(torch.tensor([0, 5, 12]))
    x = torch.randn(12, 1, HIDDEN, dtype=torch.float64)
    with torch.inference_mode():
        expected, _ = layer(x, sequences=sequences)
    y, _ = layer(x, sequences=sequences)
    y.sum().backward()
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_future_is_not_seen(name, settings):
    layer = build(name, settings)
    x = torch.randn(20, 2, HIDDEN, dtype=torch.float64)
    changed = x.clone()
    changed[13:] += 1
    # Newton's method makes as many steps as the whole row needs: equal up to its tolerance.
    assert relative_error(layer(changed)[0][:13], layer(x)[0][:13]) < 1e-10
    assert relative_error(layer(changed)[0][13:], layer(x)[0][13:]) > 1e-3


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_parameters_declared_equal_counted(name, settings):
    layer = build(name, settings)
    declared = layer.num_parameters(layer.config, HIDDEN)
    declared += sum(layer.shared_tables(layer.config, HIDDEN).values())  # alone: of one row
    assert declared == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_flops_declared_equal_counted(name, settings, monkeypatch):
    """torch counts matrix products; it does not count SDPA's on a CPU, so attention's own part is
    compared with the keys that its mask lets through."""
    monkeypatch.setattr(arguments, "has_numba", lambda: False)  # whose loops torch does not count
    layer = build(name, settings)
    length = 4 * getattr(layer.config, "chunk_size", 16)
    x = torch.randn(length, 1, HIDDEN, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    declared = layer.flops_per_token(layer.config, HIDDEN, length) * length
    declared += layer.flops_per_pass(layer.config, HIDDEN)
    if name in ("attn", "swa"):
        window = layer.config.window or length
        seen = sum(min(t + 1, window) for t in range(length))
    elif name == "sliced_attn":  # the mean of its two forms
        size, stride = layer.config.slice_size, layer.config.stride
        seen = sum(t % size + 1 + t // stride + 1 for t in range(length)) / 2
    elif name == "tcnca":
        seen = sum(t % layer.config.attention_chunk + 1 for t in range(length))
    else:
        seen = 0
    if seen:
        declared -= 4 * layer.num_heads * layer.config.head_dim * seen
        # whole numbers per token: at most one FLOP per token is lost to rounding
        assert abs(declared - counter.get_total_flops()) <= length
    else:
        assert declared == counter.get_total_flops()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_state_bytes_declared_equal_counted(name, settings):
    layer = build(name, settings, torch.bfloat16)
    for length in (4, 40):
        _, state = layer(torch.randn(length, 1, HIDDEN, dtype=torch.bfloat16))
        counts = ("lengths", "seen")
        counted = sum(t.numel() * t.element_size() for k, t in state.items() if k not in counts)
        assert counted == layer.state_bytes(layer.config, HIDDEN, length)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_bf16_is_close_to_float32(name, settings):
    narrow = build(name, settings, torch.bfloat16)
    wide = build(name, settings, torch.float32)
    with torch.no_grad():
        for a, b in zip(wide.parameters(), narrow.parameters(), strict=True):
            a.copy_(b)
    x = torch.randn(50, 2, HIDDEN).bfloat16()
    y, _ = narrow(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, wide(x.float())[0]) < 4e-2


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("shape", [(0, 2), (5, 0), (0, 0)])
def test_no_tokens_and_no_rows(name, settings, shape):
    layer = build(name, settings)
    x = torch.zeros(*shape, HIDDEN, dtype=torch.float64, requires_grad=True)
    y, state = layer(x)
    assert y.shape == (*shape, HIDDEN)
    y.sum().backward()
    if shape == (0, 2):  # the state is the one before any token
        expected = layer.init_state(2)
        assert all(torch.equal(state[key], expected[key]) for key in expected)


GATES = (
    "A_log",
    "dt_bias",
    "a_bias",
    "bias",
    "lower_bound",
    "bounds.table.weight",
    "g_bias",
    "b_proj.weight",
)


@pytest.mark.parametrize("shift", [-20.0, 0.0, 20.0])
@pytest.mark.parametrize("name", registry())
def test_extreme_gates_stay_finite(name, shift):
    """4096 steps of inputs that drive every gate to its ends, gradients included: decays next to 0
    and 1, beta at 0 and at its most. A quarter of them between the ends."""
    layer = build(name, SMALL.get(name, [{}])[-1], torch.float32)
    with torch.no_grad():
        for gate, parameter in layer.named_parameters():
            if gate in GATES:
                parameter += shift
    x = (100 * torch.randn(4096 if shift else 1024, 1, HIDDEN)).requires_grad_()
    y, state = layer(x)
    found = torch.autograd.grad(y.square().mean(), [x, *layer.parameters()], allow_unused=True)
    for tensor in (y, *found):
        assert tensor is None or bool(torch.isfinite(tensor).all())
    # -inf is sLSTM's stabiliser before the first token; behind one, every state is finite.
    assert all(bool(torch.isfinite(t).all()) for t in state.values())
