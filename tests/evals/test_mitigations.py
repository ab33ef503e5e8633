"""The options of recurrent states in commands: what they change, and what is refused."""

from __future__ import annotations

import argparse

import pytest
import torch

from evals.commands import _mark
from evals.mitigations import add_options, apply_options, given_options
from evals.perplexity import evaluate_perplexity
from evals.positions import evaluate_positions
from pretrain.common.errors import UserError
from pretrain.inference.generate import generate
from pretrain.inference.score import Pair, StateScorer
from tests.helpers.loaded_model import loaded

pytestmark = pytest.mark.usefixtures("processes")


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return given_options(parser.parse_args(words))


def written(model):
    prompt = [5, 9, 200, 31]
    made = generate(model.model, prompt, max_tokens=12, temperature=0.0, seed=0, vocab_size=384)
    return list(made)


def scores(model):
    by_position = evaluate_positions(model, factor=4, sequences=2)["bins"]
    pairs = [Pair([7, 8, 9], [10, 11, 12]), Pair([7, 8, 9, 30, 31], [10, 11])]
    return torch.tensor(
        [
            *(b["nats_per_token"] for b in by_position),
            *(s for s, _ in StateScorer(model.model, 384).log_likelihoods(pairs)),
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--state-decay-scale", "4", "--state-write-scale", "0.1"],
        ["--state-norm", "0.01", "--state-norm-every", "3"],
        ["--state-norm", "measured", "--state-norm-every", "8"],
        ["--state-window", "2"],
    ],
)
def test_scores_change_and_come_back(corpus, words):
    model = loaded(corpus, pattern="mamba2 attn")
    with torch.no_grad():  # a model that does not yet write would not show it
        for parameter in model.model.parameters():
            parameter.mul_(3)
    plain, text = scores(model), written(model)
    apply_options(model, parsed("--state-decay-scale", "1"))
    assert torch.equal(scores(model), plain) and written(model) == text
    apply_options(model, parsed(*words))
    changed = scores(model)
    assert not torch.allclose(changed, plain, rtol=1e-9)
    # The same whether prefixes are shared, and whether the text comes in pieces.
    pairs = [Pair([7, 8, 9], [10, 11, 12]), Pair([7, 8, 9, 30, 31], [10, 11])]
    alone = StateScorer(model.model, 384, share_prefixes=False).log_likelihoods(pairs)
    assert [s for s, _ in alone] == pytest.approx(changed[-2:].tolist(), rel=1e-10)
    first = written(model)
    logits = model.model(torch.tensor([[5, 9, 200, 31, *first[:-1]]]))
    assert logits[0, 3:].argmax(-1).tolist() == first


def test_what_a_layer_lacks_and_what_is_no_number_is_refused(corpus, capsys):
    with pytest.raises(UserError, match=r"state_window is 4, but 'gdn' \(block 0\) has no"):
        apply_options(loaded(corpus), parsed("--state-window", "4"))
    model = loaded(corpus, pattern="gla", seq_len=10**6)
    with pytest.raises(UserError, match="expected at least the training length of 1,000,000"):
        apply_options(model, parsed("--state-norm", "measured"))
    for words, message in [
        (["--state-norm", "some"], "found 'some', expected a number above 0 or 'measured'"),
        (["--state-decay-scale", "-1"], "expected a number above 0"),
        (["--state-window", "2.5"], "found '2.5', expected a whole number from 1"),
    ]:
        with pytest.raises(SystemExit):
            parsed(*words)
        assert message in capsys.readouterr().err


def test_results_with_options_have_files_of_their_own(corpus):
    options = parsed("--state-write-scale", "0.5", "--state-window", "64")
    assert _mark(dict(options), ()) == "-state-write-scale-0.5-state-window-64"
    model = loaded(corpus, pattern="gla")
    plain = evaluate_perplexity(model, max_tokens=200)
    apply_options(model, parsed("--state-window", "1"))
    assert evaluate_perplexity(model, max_tokens=200) != plain
