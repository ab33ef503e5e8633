"""Scores and texts of many requests at once, for every mixer, against one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from pretrain.inference.prefix_tree import Node, prefix_tree
from pretrain.inference.score import Pair, Prompt, StateScorer
from pretrain.model.build import build_model
from pretrain.nn.mixers import registry
from tests.helpers.small_mixers import SMALL
from tests.helpers.small_model import VOCAB, settings

pytestmark = pytest.mark.usefixtures("processes")
CANDIDATES = VOCAB - 7  # as if the last rows padded the vocabulary
HEADER = list(range(1, 25))
# Two questions with answers behind a long header, one pair that begins another, a copy of a pair.
PAIRS = [
    Pair([*HEADER, *question], answer)
    for question in ([5, 6, 7], [5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21])
    for answer in ([3, 4], [3, 9, 2, 2, 7], [11])
] + [
    Pair(HEADER, [5]),
    Pair(HEADER, [5, 6, 7]),
    Pair([40], [41] * 20),
    Pair([40], [41] * 20),
    Pair([2, 3], [1, 9, 3]),
]


def model_of(name, dtype=torch.float64):
    small = SMALL.get(name, [{}])[0]
    changes = {"pattern": f"{name} attn", "mixers": {**settings().mixers, name: small}}
    if name == "attn":
        changes["pattern"] = "2*attn"
    return build_model(settings(**changes), VOCAB, seed=3, dtype=dtype).eval()


def one_at_a_time(model, pair):
    """(log-likelihood, whether greedy) by the whole sequence's logits."""
    ids = torch.tensor([[*pair.context, *pair.continuation]])
    with torch.no_grad():
        logits = model(ids[:, :-1])[0, len(pair.context) - 1 :]
    wanted = torch.tensor(pair.continuation)
    likeliest = logits[:, :CANDIDATES].argmax(-1)
    total = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    return float(total), bool((likeliest == wanted).all())


@pytest.mark.parametrize("name", registry())
def test_scores_do_not_depend_on_what_is_scored_beside(name):
    model = model_of(name)
    truth = [one_at_a_time(model, pair) for pair in PAIRS]
    for options in (
        {"share_prefixes": False, "tokens_per_pass": 1},  # each request alone
        {"share_prefixes": False},
        {"tokens_per_pass": 20},
        {},
    ):
        found = StateScorer(model, CANDIDATES, **options).log_likelihoods(PAIRS)
        for a, b in zip(found, truth, strict=True):
            assert a[0] == pytest.approx(b[0], rel=1e-9), options
            assert a[1] == b[1]


def test_long_prefixes_go_into_smaller_passes(monkeypatch):
    """Attention's keys and values are handed on to every child, so they count for each."""
    model, sizes = model_of("attn"), []
    count = StateScorer._how_many

    def noted(self, nodes, depths):
        sizes.append(count(self, nodes, depths))
        return sizes[-1]

    monkeypatch.setattr(StateScorer, "_how_many", noted)
    wide = StateScorer(model, CANDIDATES).log_likelihoods(PAIRS)
    most = max(sizes)
    monkeypatch.setattr(
        "pretrain.inference.score._STATE_BYTES",
        3 * StateScorer(model, 9)._state_bytes(40),
    )
    sizes.clear()
    assert np.allclose(StateScorer(model, CANDIDATES).log_likelihoods(PAIRS), wide, rtol=1e-9)
    assert 1 <= max(sizes) < most


def test_a_greedy_continuation_is_known_for_one():
    model = model_of("gdn")
    scorer = StateScorer(model, CANDIDATES)
    (ids,) = scorer.generate([Prompt([1, 2, 3], 4, lambda made: False)])
    assert scorer.log_likelihoods([Pair([1, 2, 3], ids)])[0][1]
    assert not scorer.log_likelihoods([Pair([1, 2, 3], [*ids[:3], (ids[3] + 1) % 9])])[0][1]


@pytest.mark.parametrize("name", registry())
def test_texts_do_not_depend_on_what_is_written_beside(name):
    model = model_of(name)
    prompts = [
        Prompt(pair.context, 3 + number % 4, lambda made: made[-1] % 5 == 0)
        for number, pair in enumerate(PAIRS)
    ] + [Prompt([7, 7], 6, lambda made: False, temperature=1.0, seed=4)]
    together = StateScorer(model, CANDIDATES).generate(prompts)
    alone = StateScorer(model, CANDIDATES, share_prefixes=False, tokens_per_pass=1)
    assert together == [alone.generate([prompt])[0] for prompt in prompts]
    for prompt, ids in zip(prompts[:-1], together[:-1], strict=True):
        assert all(i < CANDIDATES for i in ids)
        assert len(ids) == prompt.max_tokens or prompt.done(ids)
        assert not any(prompt.done(ids[:end]) for end in range(1, len(ids)))
        ids_so_far = list(prompt.ids)
        for token in ids:  # token by token over the whole text, without states
            with torch.no_grad():
                logits = model(torch.tensor([ids_so_far]))[0, -1, :CANDIDATES]
            assert int(logits.argmax()) == token
            ids_so_far.append(token)


def test_states_of_every_pass_of_a_loop_are_handed_on():
    recursion = {"times": 3, "prelude": 1, "lora_rank": 2, "step_signal": "learned"}
    mixers = {**settings().mixers, "rat": SMALL["rat"][1]}
    changed = settings(pattern="gdn rat attn gdn", mixers=mixers, recursion=recursion)
    model = build_model(changed, VOCAB, seed=1, dtype=torch.float64).eval()
    found = StateScorer(model, CANDIDATES).log_likelihoods(PAIRS)
    for pair, (value, _) in zip(PAIRS, found, strict=True):
        assert value == pytest.approx(one_at_a_time(model, pair)[0], rel=1e-9)


@settings_of_hypothesis(deadline=None, max_examples=80)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60), min_size=1, max_size=12),
    st.booleans(),
)
def test_a_tree_spells_its_sequences(sequences, copies):
    if copies:
        sequences = sequences + [[*s, 1] for s in sequences] + sequences[:3]
    pending: list[tuple[list[int], Node]] = [([], root) for root in prefix_tree(sequences)]
    spelled = {}
    while pending:
        above, node = pending.pop()
        path = [*above, *node.tokens]
        assert node.tokens
        for number in node.ends:
            assert number not in spelled
            spelled[number] = path
        pending += [(path, child) for child in node.children]
    assert spelled == dict(enumerate(sequences))


def test_what_is_shared_is_computed_once():
    nodes = [
        n
        for root in prefix_tree([[*p.context, *p.continuation] for p in PAIRS])
        for n in root.walk()
    ]
    assert sum(n.tokens[: len(HEADER)] == HEADER for n in nodes) == 1
    assert (
        sum(len(n.tokens) for n in nodes)
        < sum(len(p.context) + len(p.continuation) for p in PAIRS) / 2
    )
