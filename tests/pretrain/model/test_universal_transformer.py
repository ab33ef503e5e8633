"""The Universal Transformer as published, against its equations (arXiv 1807.03819)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from pretrain.common.config_loader import ConfigError, build_config
from pretrain.config import ModelConfig
from pretrain.model.build import build_model
from pretrain.model.counts import count_model
from pretrain.model.spec import check_model
from tests.helpers.recursion_kinds import KINDS, UNIVERSAL_BLOCKS
from tests.helpers.relative_error import relative_error

pytestmark = pytest.mark.usefixtures("processes")
VOCAB, WIDTH, HEADS = 50, 16, 2


def settings(pattern="attn", **changes):
    values = {
        "hidden_size": WIDTH,
        "pattern": pattern,
        "mixers": {
            "attn": {"num_heads": HEADS, "rope_theta": None},
            "gdn": {"num_heads": 2, "head_dim": 4, "chunk_size": 8},
        },
        **UNIVERSAL_BLOCKS,
        "init_std": 0.3,
        "scale_embeddings": True,
        "recursion": {**KINDS["published"], "times": 6, "position_offsets": 0},
        "vocab_size": VOCAB,
        **changes,
    }
    return build_config(ModelConfig, values, "test")


def make(**changes):
    """With norms and halting that are not those of the start."""
    model = build_model(settings(**changes), VOCAB, seed=0, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name or "halting" in name:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * drawn
    parameters = dict(model.named_parameters())
    parameters["recursion.halting_weight"].data.mul_(3)  # halts at different passes
    parameters["recursion.halting_bias"].data.fill_(-0.5)
    return model


def loop(**changes):
    return {**KINDS["published"], "times": 6, "position_offsets": 0, **changes}


def coordinate(position, step):
    """P of the paper, for position and pass from 1."""
    found = torch.zeros(WIDTH, dtype=torch.float64)
    for j in range(WIDTH // 2):
        scale = 10_000 ** (2 * j / WIDTH)
        found[2 * j] = math.sin(position / scale) + math.sin(step / scale)
        found[2 * j + 1] = math.cos(position / scale) + math.cos(step / scale)
    return found


def published(model, tokens, *, copied, first=1):
    """Logits and passes of one text, by the paper's equations; positions begin at ``first``."""
    block, config = model.blocks[0], model.model_config.recursion

    def normed(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        scaled = centred / (variance + model.model_config.norm_eps).sqrt()
        return scaled * layer.weight + layer.bias

    def attention(x):
        q, k, v = (
            getattr(block.mixer, f"{name}_proj")(x[:, None])[:, 0].unflatten(-1, (HEADS, -1))
            for name in "qkv"
        )
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(WIDTH // HEADS)
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, v).flatten(1) @ block.mixer.o_proj.weight.T

    def transition(x):
        inner = (x @ block.mlp.up_proj.weight.T).relu()
        return inner @ block.mlp.down_proj.weight.T

    length = len(tokens)
    states = model.embedding.weight[tokens] * math.sqrt(WIDTH)
    output, total = torch.zeros_like(states), torch.zeros(length, dtype=torch.float64)
    running, passes = torch.ones(length, dtype=torch.bool), torch.zeros(length)
    for step in range(1, config.times + 1):
        x = states + torch.stack([coordinate(i + first, step) for i in range(length)])
        a = normed(x + attention(x), block.mixer_norm)
        new = normed(a + transition(a), block.mlp_norm)
        p = torch.sigmoid(x @ model.recursion.halting_weight[0] + model.recursion.halting_bias)
        for t in range(length):
            if not running[t]:
                continue
            passes[t] += 1
            ends = total[t] + p[t] > config.halting_threshold or step == config.times
            weight = 1 - total[t] if ends else p[t]
            output[t] += weight * new[t]
            total[t] += weight
            running[t] = not ends
        if copied:
            done = ~running & (passes < step)
            new = torch.where(done[:, None], states, new)
        states = new
    torch.testing.assert_close(total, torch.ones_like(total))
    return normed(output, model.final_norm) @ model.embedding.weight.T, passes


@torch.no_grad()
@pytest.mark.parametrize("kept", ["copy", "carry"])
def test_a_model_is_the_papers_equations(kept):
    model = make(recursion=loop(halting_state=kept))
    tokens = torch.randint(VOCAB, (11,), generator=torch.Generator().manual_seed(2))
    logits, passes = published(model, tokens, copied=kept == "copy")
    assert len(set(passes.tolist())) > 1
    assert relative_error(model(tokens[None])[0], logits) < 1e-12
    other, _ = published(model, tokens, copied=kept != "copy")
    assert relative_error(other, logits) > 1e-6


@torch.no_grad()
def test_positions_are_those_of_each_document_and_go_on_with_states():
    model = make(pattern="gdn attn")
    tokens = torch.randint(VOCAB, (2, 12))
    whole, _ = model.forward_with_state(tokens, None)
    assert relative_error(model(tokens), whole) < 1e-12
    parts, states = [], None
    for piece in tokens.split([5, 1, 1, 5], 1):
        logits, states = model.forward_with_state(piece, states)
        parts.append(logits)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-11
    lengths = torch.tensor([0, 4, 12])
    packed = model(tokens[:1], cu_seqlens=lengths)
    alone = torch.cat([model(piece) for piece in tokens[:1].split([4, 8], 1)], 1)
    assert relative_error(packed, alone) < 1e-11
    assert relative_error(packed, whole[:1]) > 1e-3
    first, states = model.forward_with_state(tokens[:1, :6], None, cu_seqlens=lengths // 2)
    then, _ = model.forward_with_state(tokens[:1, 6:], states, cu_seqlens=lengths // 2)
    for row, cut in ((0, slice(0, 2)), (1, slice(2, 6))):
        text = torch.cat([tokens[:1, :6][:, cut], tokens[:1, 6:][:, cut]], 1)
        found = torch.cat([first[:, cut], then[:, cut]], 1)
        assert relative_error(found, model(text)) < 1e-11, row


@torch.no_grad()
def test_a_pass_that_surely_halts_is_one_block():
    model = make(recursion=loop(times=1))
    model.recursion.halting_bias.fill_(50)
    tokens = torch.randint(VOCAB, (1, 9))
    x = model.embed(tokens) + torch.stack([coordinate(i + 1, 1) for i in range(9)])[:, None]
    expected, _ = model.blocks[0](x)
    assert relative_error(model.hidden_states(tokens)[0], expected[:, 0]) < 1e-12


@torch.no_grad()
def test_without_early_halts_copies_change_nothing():
    models = [make(recursion=loop(halting_state=kept)) for kept in ("copy", "carry")]
    for model in models:
        model.recursion.halting_weight.zero_()
        model.recursion.halting_bias.fill_(-5)
    tokens = torch.randint(VOCAB, (2, 9))
    assert torch.equal(models[0](tokens), models[1](tokens))


@torch.no_grad()
def test_what_has_halted_is_seen_alike_in_all_later_passes():
    """Without a signal, which would tell passes apart."""
    tokens = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(3))
    for kept in ("copy", "carry"):
        model = make(recursion=loop(halting_state=kept, step_signal="none", times=6))
        keys = [state["k"] for state in model.states(tokens)]
        still = torch.stack([(a == b).flatten(1).all(1) for a, b in pairwise(keys)])
        assert bool(still.any()) == (kept == "copy")
        assert torch.equal(still, still.cummax(0).values)  # from some pass on
        assert kept == "carry" or len(set(still.sum(0).tolist())) > 1


def test_training_positions_begin_anywhere_up_to_the_limit():
    model = make(recursion=loop(position_offsets=40, times=2))
    tokens, targets = torch.randint(VOCAB, (2, 6, 8))
    plain = model(tokens, targets)
    assert torch.equal(model.eval()(tokens, targets), plain)
    model.train()

    def losses(step, parts):
        model.recursion.begin_step(0, step)
        return torch.cat([model(a, b) for a, b in zip(*parts, strict=True)])

    whole = losses(3, ([tokens], [targets]))
    assert relative_error(losses(3, (tokens.split(2), targets.split(2))), whole) < 1e-12
    assert relative_error(losses(4, ([tokens], [targets])), whole) > 1e-3
    model.recursion.begin_step(0, 3)
    model.recursion.num_passes()
    begins = model.recursion._offsets(model.embed(tokens))
    assert (begins == begins[:1]).all()
    assert len(set(begins[0].tolist())) > 2
    assert int(begins.min()) >= 0 and int(begins.max()) <= 40
    for row in range(6):
        first = 1 + int(begins[0, row])
        logits, _ = published(model, tokens[row], copied=True, first=first)
        expected = F.cross_entropy(logits, targets[row], reduction="none")
        assert relative_error(whole[row], expected) < 1e-10


def test_the_ponder_cost_reaches_what_feeds_halting_alone():
    model = make()
    tokens, targets = torch.randint(VOCAB, (2, 2, 8))
    gradients = []
    for weight in (0.0, 0.5):
        model.zero_grad()
        model.train()
        model.recursion.config.ponder_weight = weight
        model(tokens, targets).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    changed = {n for n in gradients[0] if not torch.equal(gradients[0][n], gradients[1][n])}
    assert {"recursion.halting_weight", "recursion.halting_bias"} <= changed
    assert not changed & {"final_norm.weight", "final_norm.bias"}


@pytest.mark.parametrize("norm", ["pre", "sandwich", "post", "sum"])
def test_parameters_are_counted(norm):
    config = settings(pattern="attn gdn", block_norm=norm)
    model = build_model(config, VOCAB, seed=0)
    counted = count_model(config, VOCAB, 16)
    assert counted.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pattern": "2*gdn"},
            r"is coordinate, but no layer in the loop \(gdn\) counts the tokens",
        ),
        (
            {"recursion": {"times": 2, "position_offsets": 4}},
            "position_offsets is 4, but step_signal none has no positions; expected coordinate",
        ),
        ({"recursion": {"halting_state": "copy"}}, "halting_state is copy, but no token halts"),
        ({"block_norm": "after"}, "block_norm is 'after', expected"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_model(settings(**changes), "test")
