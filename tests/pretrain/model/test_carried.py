"""Rows that carry states: losses and gradients are those of states that are handed over."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from pretrain.common.config_loader import ConfigError
from pretrain.data.batches import pack_rows
from pretrain.model.carried import CarriedStates
from pretrain.nn.mixers import State, registry
from tests.helpers.channel_mixing import CHANNELS, with_output
from tests.helpers.recursion_kinds import KINDS
from tests.helpers.relative_error import relative_error
from tests.helpers.small_mixers import SMALL
from tests.helpers.small_model import VOCAB, make

pytestmark = pytest.mark.usefixtures("processes")
ROWS, LENGTH, STEPS, EOD = 2, 24, 3, 7
FLAT = [name for name in registry() if name not in ("attn", "rat", "sliced_attn")]
HYBRIDS = ("gdn swa slstm mamba2", "gru retnet para_gru")


def small(pattern, **changes):
    mixers = {name: SMALL[name][0] for name in set(pattern.split()) if SMALL.get(name)}
    if "swa" in mixers:
        mixers["swa"] = {**mixers["swa"], "window": 9}
    return make(pattern=pattern, mixers=mixers, **changes)


def text(micro_batches=1):
    """Rows of a text, of which the first has no document that begins in the second step."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (micro_batches * ROWS, STEPS * LENGTH + 1))
    tokens[tokens == EOD] = EOD + 1
    for row, places in enumerate([(5, 52), (0, 24, 31, 47, 48, 60)] * micro_batches):
        tokens[row, list(places)] = EOD
    return tokens


def batches_of(tokens, step):
    rows = tokens[:, step * LENGTH : (step + 1) * LENGTH + 1]
    return [pack_rows(part, EOD, [step > 0] * ROWS) for part in np.split(rows, len(rows) // ROWS)]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def carried_losses(model, tokens, noise=0.0, seed=0):
    """Losses ``[row, LENGTH]`` of each step, and gradients after it."""
    model.carried = CarriedStates(model, len(tokens) // ROWS, ROWS, noise)
    for step in range(STEPS):
        model.zero_grad()
        model.begin_step(seed, step)
        batches = batches_of(tokens, step)
        model.carried.expect(batches)
        losses = [model(b.tokens, b.targets, sequences=b.sequences) for b in batches]
        sum((x * torch.arange(1, x.numel() + 1)).sum() for x in losses).backward()
        yield torch.cat([x.detach().view(ROWS, LENGTH) for x in losses]), gradients(model)


def handed_over_losses(model, tokens):
    """The same, of one document at a time, from the state behind what came of it before."""
    states: list[list[State] | None] = [None] * len(tokens)
    for step in range(STEPS):
        model.zero_grad()
        found = []
        for row, ids in enumerate(torch.from_numpy(tokens)):
            begin, end = step * LENGTH, (step + 1) * LENGTH
            cuts = sorted({begin, end, *(i for i in range(begin, end) if ids[i] == EOD)})
            for first, last in itertools.pairwise(cuts):
                state = None if ids[first] == EOD else states[row]
                logits, after = model.forward_with_state(ids[None, first:last], state)
                found.append(cross_entropy(logits[0], ids[first + 1 : last + 1], reduction="none"))
                states[row] = [{n: x.detach() for n, x in s.items()} for s in after]
        losses = torch.cat(found).view(-1, ROWS * LENGTH)
        (losses * torch.arange(1, ROWS * LENGTH + 1)).sum().backward()
        yield losses.detach().view(-1, LENGTH), gradients(model)


def check(model, tokens, tolerance=1e-10):
    expected = list(handed_over_losses(model, tokens))
    for (losses, grads), (wanted, wanted_grads) in zip(
        carried_losses(model, tokens), expected, strict=True
    ):
        assert relative_error(losses, wanted) < tolerance
        assert grads.keys() == wanted_grads.keys()
        for name, value in wanted_grads.items():
            assert relative_error(grads[name], value) < tolerance, name


@pytest.mark.parametrize("name", FLAT)
def test_every_mixer_whose_state_has_one_size(name):
    check(small(name), text())


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("pattern", HYBRIDS)
def test_hybrids_with_gradient_accumulation_and_checkpointing(pattern, checkpointing):
    model = small(pattern)
    model.activation_checkpointing = checkpointing
    check(model, text(micro_batches=3))


@pytest.mark.parametrize("kind", ["looped", "lora", "halting"])
def test_loops_carry_a_state_for_every_pass(kind):
    check(small("gdn gru swa", recursion={**KINDS[kind], "ponder_weight": 0}), text())


def test_mlps_that_have_a_state():
    check(with_output(small("gdn swa", **CHANNELS)), text())


def test_other_micro_batches_are_refused():
    model = small("gdn")
    model.carried = CarriedStates(model, 1, ROWS + 1)
    with pytest.raises(ValueError, match=r"1 micro-batches of 3 rows that read on, found \[2\]"):
        model.carried.expect(batches_of(text(), 0))


def test_evaluation_leaves_states_alone():
    model, tokens = small("gdn swa"), text()
    expected = [x for x, _ in carried_losses(model, tokens)]
    found = []
    for losses, _ in carried_losses(model, tokens):
        found.append(losses)
        (batch,) = batches_of(tokens, 1)
        with torch.no_grad():
            model.eval()(batch.tokens, batch.targets, sequences=batch.sequences)
        model.train()
    assert all(map(torch.equal, found, expected))


def noisy(noise, seed=0, micro_batches=1):
    model = small("gdn swa slstm retnet")
    tokens = np.concatenate([text(), text()[::-1]])
    if micro_batches == 1:
        tokens = tokens[:2]
    return [x for x, _ in carried_losses(model, tokens, noise, seed)]


def test_noise_depends_on_seed_step_and_row_alone():
    one, again, two, other = noisy(0.2), noisy(0.2), noisy(0.2, 0, 2), noisy(0.2, 1)
    without = noisy(0.0)
    assert all(map(torch.equal, one, again))
    for step in range(STEPS):
        assert relative_error(two[step][:ROWS], one[step]) < 1e-12
    assert torch.equal(one[0], without[0]), "nothing is carried into the first step"
    for step in (1, 2):
        assert 1e-4 < relative_error(one[step], without[step]) < 1
        assert relative_error(one[step], other[step]) > 1e-4
    # A document that begins with a row has no state to disturb.
    assert torch.equal(one[1][1], without[1][1])


def test_noise_has_the_size_that_was_asked_for():
    model = small("slstm swa")
    model.carried = states = CarriedStates(model, 1, ROWS, noise=0.5)
    slstm, swa = states._layers
    clean = {n: torch.ones_like(v) * (1 + i) for i, (n, v) in enumerate(slstm.values.items())}
    states.begin_step(0, 0, 0, 1)
    disturbed = states._noisy(slstm, clean, 0)
    for name in ("n", "m"):
        assert torch.equal(disturbed[name], clean[name])
    for name in ("h", "c"):
        assert float((disturbed[name] - clean[name]).std() / clean[name].mean()) == pytest.approx(
            0.5, rel=0.3
        )
    keys = swa.state_of(slice(0, ROWS))
    assert all(states._noisy(swa, keys, 0)[name] is keys[name] for name in keys)


def test_a_state_that_is_packed_without_saying_so_is_refused():
    model = small("swa")
    model.blocks[0].mixer.windowed_states = ()
    with pytest.raises(ConfigError, match=r"'k' in the state of SlidingWindowAttention is \(0, "):
        CarriedStates(model, 1, ROWS)
