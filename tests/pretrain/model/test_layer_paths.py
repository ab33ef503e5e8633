"""Blocks left out, repeated and reordered at inference, with states for every occurrence."""

from __future__ import annotations

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.inference.generate import generate
from pretrain.inference.layer_paths import parse_path, path_text, set_path
from pretrain.inference.score import Pair, StateScorer
from tests.helpers.small_model import VOCAB, make, settings

pytestmark = pytest.mark.usefixtures("processes")

TOKENS = torch.randint(VOCAB, (2, 23), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "path", "shortest"),
    [
        ("0-3,2-3,5", (0, 1, 2, 3, 2, 3, 5), "0-3,2-3,5"),
        ("0,1,2,3", (0, 1, 2, 3), "0-3"),
        ("3-1", (3, 2, 1), "3,2,1"),
        ("2, 2,2", (2, 2, 2), "2,2,2"),
    ],
)
def test_paths_are_read_and_written(text, path, shortest):
    assert parse_path(text, 6) == path
    assert path_text(path) == shortest
    assert parse_path(shortest, 6) == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has '', expected numbers of blocks"),
        ("0-", "has '0-', expected numbers"),
        ("a,1", "has 'a', expected numbers"),
        ("-1", "has '-1', expected numbers"),
        ("0-6", "names block 6, but the model's blocks are 0 to 5"),
        (",".join(["0-5"] * 2000), "has more than 10,000 blocks"),
    ],
)
def test_what_is_no_path_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_path(text, 6)


def test_the_path_of_all_blocks_is_the_model_to_the_last_bit():
    model = make().eval()
    plain, states = model(TOKENS), model.states(TOKENS)
    set_path(model, range(4))
    assert torch.equal(model(TOKENS), plain)
    for a, b in zip(model.states(TOKENS), states, strict=True):
        assert a.keys() == b.keys()
    set_path(model, [0, 1, 3])
    assert not torch.allclose(model(TOKENS), plain)
    set_path(model, None)
    assert torch.equal(model(TOKENS), plain)


def test_a_path_with_repeats_is_a_loop_of_the_same_blocks():
    model = make().eval()
    looped = make(recursion={"prelude": 1, "coda": 1, "times": 3}).eval()
    looped.load_state_dict(model.state_dict())
    set_path(model, [0, 1, 2, 1, 2, 1, 2, 3])
    assert torch.equal(model(TOKENS), looped(TOKENS))
    assert model.blocks_by_state() == looped.blocks_by_state()


@pytest.mark.parametrize("path", [(0, 1, 1, 2, 3), (3, 1), (0, 0, 2)])
def test_states_are_of_each_occurrence(path):
    model = make().eval()
    set_path(model, path)
    whole = model(TOKENS)
    first, states = model.forward_with_state(TOKENS[:, :9], None)
    second, _ = model.forward_with_state(TOKENS[:, 9:], states)
    assert len(states) == len(path)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    prompt = TOKENS[0, :7].tolist()
    made = list(generate(model, prompt, max_tokens=8, temperature=0, seed=0, vocab_size=VOCAB))
    logits = model(torch.tensor([[*prompt, *made[:-1]]]))
    assert logits[0, 6:].argmax(-1).tolist() == made
    pairs = [Pair(prompt, [1, 2, 3]), Pair(prompt, [1, 5]), Pair([4], [9])]
    shared = StateScorer(model, VOCAB).log_likelihoods(pairs)
    alone = StateScorer(model, VOCAB, share_prefixes=False).log_likelihoods(pairs)
    assert [v for v, _ in shared] == pytest.approx([v for v, _ in alone], rel=1e-12)


def test_a_model_with_a_loop_and_values_that_are_not_there_are_refused():
    looped = make(recursion={"times": 2})
    with pytest.raises(UserError, match="the model has a loop of its own: --recurrences"):
        set_path(looped, [0])
    mixers = {"rwkv7": {"num_heads": 2, "head_dim": 12}}
    model = make(pattern="3*rwkv7", mixers=mixers).eval()
    with pytest.raises(UserError, match="1,0,2 runs block 1 before the first block of 'rwkv7'"):
        set_path(model, [1, 0, 2])
    set_path(model, [0, 2, 2])
    assert model(TOKENS).isfinite().all()
    assert settings(pattern="3*rwkv7", mixers=mixers).hidden_size == 24
