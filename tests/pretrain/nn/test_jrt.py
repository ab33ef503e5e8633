"""JRT-RNN's layer against its equations in float64, with and without a prefix."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from evals.harness.schedule_scoring import ScheduleScorer
from evals.held_out import open_held_out
from pretrain.common.config_loader import ConfigError
from pretrain.config import OptimizerConfig, RunConfig
from pretrain.data.sequences import Sequences
from pretrain.inference.score import Pair, Prompt, StateScorer
from pretrain.model.layout import check_layout
from pretrain.nn.mixers import jrt
from pretrain.training.engine import Engine
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error, small_layer
from tests.helpers.small_model import VOCAB, make, settings

HIDDEN, LENGTHS, PREFIX = 24, [5, 1, 17, 9], 6
SMALL = {"num_heads": 2, "feature_dim": 3, "chunk_size": 8}
pytestmark = pytest.mark.usefixtures("processes")


def inputs(total):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64)


def definition(layer, x, lengths, prefixes=None):
    """Weighted means of all values that a token sees, each document alone."""
    heads, outputs = layer.num_heads, []
    prefixes = prefixes or [layer.config.prefix_length] * len(lengths)
    scale = layer.config.feature_dim**-0.5
    for part, prefix in zip(x.split(lengths), prefixes, strict=True):

        def read(projection, part=part):
            return F.linear(part, projection.weight).unflatten(-1, (heads, -1))

        q, k, v = (read(getattr(layer, f"{name}_proj")) for name in "qkv")
        if prefix:
            ahead_k, ahead_v = read(layer.prefix_k_proj), read(layer.prefix_v_proj)
        for t in range(len(part)):
            keys, values = k[: t + 1], v[: t + 1]
            if prefix:
                keys = torch.cat([keys, ahead_k[:prefix]])
                values = torch.cat([values, ahead_v[:prefix]])
            u = scale * torch.einsum("hk,shk->sh", q[t], keys)
            weights = 1 + u + u**2 / 2
            outputs.append((weights / weights.sum(0))[..., None].mul(values).sum(0).flatten())
    return torch.stack(outputs) @ layer.o_proj.weight.T


@pytest.mark.parametrize("prefix", [0, PREFIX])
def test_outputs_and_gradients_are_those_of_the_equations(prefix):
    layer = small_layer("jrt", HIDDEN, prefix_length=prefix, **SMALL)
    x = inputs(sum(LENGTHS)).requires_grad_()
    found, _ = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = definition(layer, x, LENGTHS)
    assert largest_error(found[:, 0], expected, [x, *layer.parameters()]) < 1e-11
    rows, _ = layer(x[:30].view(3, 10, HIDDEN).transpose(0, 1))
    assert (
        relative_error(rows.transpose(0, 1).flatten(0, 1), definition(layer, x[:30], [10] * 3))
        < 1e-11
    )


@pytest.mark.parametrize("prefixes", [[2, 0, 17, 6], [0, 0, 0, 0], [5, 1, 17, 9]])
def test_each_document_has_a_prefix_of_its_own(prefixes, monkeypatch):
    monkeypatch.setattr(jrt, "_CHUNK", 4)
    layer = small_layer("jrt", HIDDEN, prefix_length=16, **SMALL)
    x = inputs(sum(LENGTHS)).requires_grad_()
    sequences = Sequences.from_lengths(LENGTHS).with_prefixes(prefixes)
    found, _ = layer(x[:, None], sequences=sequences)
    expected = definition(layer, x, LENGTHS, [min(prefix, 16) for prefix in prefixes])
    parameters = list(layer.parameters())
    if any(prefixes):
        assert largest_error(found[:, 0], expected, [x, *parameters]) < 1e-11
    else:  # of the prefix's projections gradients are zero, not missing
        assert relative_error(found[:, 0], expected) < 1e-11
        assert all(p is not None for p in torch.autograd.grad(found.sum(), parameters))


def test_only_the_prefix_is_seen_ahead():
    layer = small_layer("jrt", HIDDEN, prefix_length=PREFIX, **SMALL)
    lengths, x = [20, 9], inputs(29)
    sequences = Sequences.from_lengths(lengths)

    def moved(token):
        changed = x.clone()
        changed[token] += 1
        before, after = (layer(one[:, None], sequences=sequences)[0][:, 0] for one in (x, changed))
        return ((after - before).abs().amax(-1) > 1e-9).tolist()

    assert moved(PREFIX - 1) == [True] * 20 + [False] * 9
    assert moved(PREFIX) == [False] * PREFIX + [True] * (20 - PREFIX) + [False] * 9


@pytest.mark.parametrize("cut", [PREFIX, 11])
def test_a_state_has_read_the_prefix(cut):
    layer = small_layer("jrt", HIDDEN, prefix_length=PREFIX, **SMALL)
    x = inputs(20)[:, None]
    whole, final = layer(x)
    first, state = layer(x[:cut])
    second, last = layer(x[cut:], state=state)
    assert relative_error(torch.cat([first, second]), whole) < 1e-11
    assert relative_error(last["recurrent"], final["recurrent"]) < 1e-11


def test_counts_include_the_prefix():
    layer = small_layer("jrt", HIDDEN, prefix_length=8, **SMALL)
    config = layer.config
    assert layer.num_parameters(config, HIDDEN) == sum(p.numel() for p in layer.parameters())
    with FlopCounterMode(display=False) as counter:
        layer(inputs(32)[:, None])
    assert 32 * layer.flops_per_token(config, HIDDEN, 32) == counter.get_total_flops()


def hybrid(prefix):
    return {
        "pattern": "jrt attn",
        "mixers": {"jrt": {**SMALL, "prefix_length": prefix}, "attn": {"num_heads": 4}},
    }


def test_training_on_next_tokens_is_refused_with_a_prefix():
    config = RunConfig("test", settings(**hybrid(PREFIX)))
    with pytest.raises(
        ConfigError, match=r"mixer 'jrt' sees a document's first 6 tokens .* prefix_length"
    ):
        check_layout(config, 1, "test")
    check_layout(dataclasses.replace(config, model=settings(**hybrid(0))), 1, "test")
    loaded: Any = SimpleNamespace(
        model=make(**hybrid(PREFIX)), checkpoint="runs/mine", run=RunConfig("test", settings())
    )
    with pytest.raises(ConfigError, match=r"runs/mine: mixer 'jrt' sees"):
        open_held_out(loaded, None)


def test_prompts_are_scored_and_continued_with_their_prefix():
    model = make(**hybrid(PREFIX))
    scorer = StateScorer(model, VOCAB)
    ids = torch.randint(VOCAB, (20,), generator=torch.Generator().manual_seed(5)).tolist()
    pairs = [Pair(ids[:6], ids[6:9]), Pair(ids[:9], ids[9:])]
    # Enough that share fewer tokens than the prefix has.
    pairs += [Pair([*ids[:4], *ids[n : n + 6]], ids[:4]) for n in range(5, 13)]
    # Contexts that are shorter than it, and all prefix.
    pairs += [Pair(ids[:4], ids[4:9]), Pair(ids[:1], ids[1:2])]
    for pair, (found, _) in zip(pairs, scorer.log_likelihoods(pairs), strict=True):
        # Prompt first, as generation reads it.
        logits, states = model.forward_with_state(torch.tensor([pair.context]), None)
        expected = logits[:, -1:]
        if len(pair.continuation) > 1:
            rest = torch.tensor([pair.continuation[:-1]])
            expected = torch.cat([expected, model.forward_with_state(rest, states)[0]], 1)
        targets = torch.tensor(pair.continuation)[:, None]
        nats = expected[0].log_softmax(-1).gather(-1, targets).sum()
        assert found == pytest.approx(nats.item(), rel=1e-6)
    prompts = [Prompt(ids[:count], 3, lambda _: False) for count in (4, 8)]
    for prompt, text in zip(prompts, scorer.generate(prompts), strict=True):
        logits, states = model.forward_with_state(torch.tensor([prompt.ids]), None)
        chosen: list[int] = []
        for _ in range(3):
            chosen.append(int(logits[0, -1].argmax()))
            logits, states = model.forward_with_state(torch.tensor([chosen[-1:]]), states)
        assert text == chosen


def test_schedules_score_and_continue_alike():
    model = make(torch.float32, **hybrid(PREFIX))
    ids = torch.randint(VOCAB, (20,), generator=torch.Generator().manual_seed(6)).tolist()
    pairs = [Pair(ids[:n], ids[n : n + 4]) for n in (1, 4, 6, 12)]
    prompts = [Prompt(pair.context, 3, lambda _: False) for pair in pairs]
    by_states = StateScorer(model, VOCAB)
    expected = by_states.log_likelihoods(pairs), by_states.generate(prompts)
    engine = Engine(model, OptimizerConfig())
    scorer = ScheduleScorer(engine, VOCAB, filler=0, tokens_per_pass=24, multiple=1)
    for (found, greedy), wanted in zip(scorer.log_likelihoods(pairs), expected[0], strict=True):
        assert (found, greedy) == (pytest.approx(wanted[0], rel=1e-5), wanted[1])
    assert scorer.generate(prompts) == expected[1]
