"""Drafts by a loop's first passes: the ids are those of greedy decoding, whatever is drafted."""

from __future__ import annotations

import pytest
import torch

from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.inference.generate import generate
from pretrain.inference.speculate import Drafts, Speculation, speculate
from pretrain.model.build import build_model
from tests.helpers.channel_mixing import CHANNELS, with_output
from tests.helpers.recursion_kinds import KINDS, RECURRENT_DEPTH

pytestmark = pytest.mark.usefixtures("processes")
VOCAB = 30


def make(recursion, pattern="gdn attn swa gdn", std=0.3, **changes):
    values = {
        "hidden_size": 24,
        "pattern": pattern,
        "mixers": {
            "gdn": {"num_heads": 2, "head_dim": 4, "chunk_size": 8},
            "attn": {"num_heads": 4, "num_kv_heads": 2},
            "swa": {"num_heads": 2, "window": 5},
        },
        "mlp": {"ratio": 2},
        "init_std": std,
        "recursion": recursion,
        **changes,
    }
    config = build_config(ModelConfig, values, "test")
    return build_model(config, VOCAB, seed=0, dtype=torch.float64)


def greedy(model, prompt, count, **options):
    options = {"max_tokens": count, "vocab_size": VOCAB - 1, **options}
    return list(generate(model, prompt, temperature=0.0, seed=0, **options))


def drafted(model, prompt, how, **options):
    return list(speculate(model, prompt, how, **{"vocab_size": VOCAB - 1, **options}))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "published"])
@pytest.mark.parametrize("pattern", ["gdn attn swa gdn", "4*attn"])
def test_ids_are_those_of_greedy_decoding(kind, pattern):
    model = make({**KINDS[kind], "times": 4}, pattern)
    prompt = [3, 1, 4, 1, 5]
    expected = greedy(model, prompt, 13)
    for tokens, passes in ((4, 1), (2, 3)):
        drafts, how = Drafts(), Speculation(tokens, passes)
        assert drafted(model, prompt, how, max_tokens=13, drafts=drafts) == expected
        assert 0 <= drafts.accepted <= drafts.made
        assert drafts.checks + drafts.accepted == 12  # after the first, which the prompt gives
    assert model.training
    assert model.recursion.times is None


def test_ids_where_mlps_have_a_state():
    model = with_output(make({**KINDS["looped"], "times": 4}, "4*attn", **CHANNELS))
    how = Speculation(4, 1)
    assert drafted(model, [3, 1, 4], how, max_tokens=13) == greedy(model, [3, 1, 4], 13)


def test_a_loop_that_has_settled_accepts_everything():
    model = make({"prelude": 1, "coda": 1, "times": 6})
    with torch.no_grad():
        for index in model.loop:  # blocks that add nothing
            model.blocks[index].mixer.o_proj.weight.zero_()
            model.blocks[index].mlp.down_proj.weight.zero_()
    drafts = Drafts()
    found = drafted(model, [1, 2], Speculation(4), max_tokens=21, drafts=drafts)
    assert found == greedy(model, [1, 2], 21)
    assert (drafts.made, drafts.accepted, drafts.checks) == (16, 16, 4)
    assert str(drafts) == "16 of 16 drafted tokens accepted (100%), 5.00 tokens a check"


def test_ends_where_greedy_decoding_ends():
    model = make(RECURRENT_DEPTH)
    every = greedy(model, [7], 12)
    stop = every[8]
    expected = greedy(model, [7], 12, stop_ids={stop})
    how = Speculation(5)
    assert drafted(model, [7], how, max_tokens=12, stop_ids={stop}) == expected
    for count in (0, 1, 2):
        assert drafted(model, [7], how, max_tokens=count) == every[:count]


@pytest.mark.parametrize("text", ["0", "x", "4:", "4:0", "-1", "2:1:1", ""])
def test_what_is_no_speculation_is_refused(text):
    with pytest.raises(UserError, match=f"speculate is '{text}', expected TOKENS or TOKENS:PASSES"):
        Speculation.parse(text)


def test_models_that_cannot_draft_are_refused():
    assert Speculation.parse("4:2") == Speculation(4, 2)
    with pytest.raises(UserError, match="speculate is 2:1, but the model has no loop"):
        Speculation(2).check(make(None))
    with pytest.raises(UserError, match="speculate is 2:3, but the loop makes 3 passes"):
        Speculation(2, 3).check(make(RECURRENT_DEPTH))
