"""Sliding windows score every target once, and packing changes no figure."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evals.perplexity import evaluate_perplexity, score, windows
from pretrain.common.errors import UserError
from pretrain.data.batches import open_shard
from pretrain.data.manifest import Manifest
from pretrain.data.tokenizer import Tokenizer
from pretrain.model.build import build_model
from tests.helpers.small_model import VOCAB, settings

pytestmark = pytest.mark.usefixtures("processes")


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_every_target_is_scored_once_with_its_context(length, window, stride):
    stride = min(stride, window)
    document = np.arange(1, length + 1)
    scored: list[int] = []
    for w in windows(document, eod_id=0, window=window, stride=stride):
        assert len(w.inputs) <= window
        assert np.array_equal(w.inputs + 1, w.targets)  # inputs are the targets' predecessors
        context = len(w.targets) - w.scored
        assert not scored or context >= min(window - stride, len(scored))
        scored += w.targets[-w.scored :].tolist()
    assert scored == document.tolist()


def test_packing_changes_nothing():
    model = build_model(settings(), VOCAB, seed=0, dtype=torch.float64)
    documents = [np.random.default_rng(i).integers(1, VOCAB, n) for i, n in enumerate((30, 1, 17))]
    every = [w for d in documents for w in windows(d, 0, window=16, stride=8)]
    together = np.concatenate(score(model, every))
    alone = np.concatenate([score(model, [w])[0] for w in every])
    assert np.allclose(together, alone, rtol=1e-6)


def loaded(corpus, window=16):
    tokenizer = Tokenizer.load(corpus)
    vocab_size = 384
    model = build_model(settings(), vocab_size, seed=0, dtype=torch.float64).eval()
    return SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        opening_id=tokenizer.eod_id,
        opening="the end-of-document token",
        checkpoint="here",
        run=SimpleNamespace(
            train=SimpleNamespace(seq_len=window),
            data=SimpleNamespace(path=str(corpus), blend=[]),
        ),
        state=SimpleNamespace(step=1, tokens=1),
    )


def test_one_window_per_document_is_the_plain_likelihood(corpus):
    """Against every document scored whole, token after token, by hand."""
    subject = loaded(corpus)
    result = evaluate_perplexity(subject, window=10**6, stride=1)
    eod, nats, count, text_bytes = subject.tokenizer.eod_id, 0.0, 0, 0
    for shard in Manifest.load(corpus).shards:
        if shard.split != "valid":
            continue
        dataset = open_shard(corpus / shard.name)
        for i in range(len(dataset)):
            ids = torch.tensor([eod, *dataset[i].tolist()])[None]
            logits = subject.model(ids[:, :-1])[0]
            nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
            text_bytes += len(subject.tokenizer.decode(ids[0].tolist()).encode())
    assert (result["tokens"], result["bytes"]) == (count, text_bytes)
    assert result["nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert (result["window"], result["stride"]) == (10**6, 1)
    assert result["tokenizer_sha256"] == subject.tokenizer.sha256


def test_settings_that_do_not_fit_are_named(corpus):
    with pytest.raises(UserError, match="stride is 17, expected 1 to the window of 16"):
        evaluate_perplexity(loaded(corpus), stride=17)


def test_a_model_without_data_of_its_own_asks_for_some(corpus):
    subject = loaded(corpus)
    subject.run.data = SimpleNamespace(path=None, blend=[])
    with pytest.raises(UserError, match="has no training data: give --data"):
        evaluate_perplexity(subject)
    assert evaluate_perplexity(subject, data=str(corpus), max_tokens=1)["documents"] == 1


def test_it_stops_after_the_document_that_fills_max_tokens(corpus):
    few = evaluate_perplexity(loaded(corpus), max_tokens=1)
    assert few["documents"] == 1


def test_a_state_that_is_handed_on_makes_one_window_of_all(corpus):
    subject = loaded(corpus)
    whole = evaluate_perplexity(subject, window=10**6, stride=1)
    carried = evaluate_perplexity(subject, window=7, carry_state=True)
    assert carried["nats_per_token"] == pytest.approx(whole["nats_per_token"], rel=1e-5)
    assert (carried["tokens"], carried["stride"]) == (whole["tokens"], None)
    cut = evaluate_perplexity(subject, window=7, stride=7)
    assert abs(cut["nats_per_token"] - whole["nats_per_token"]) > 1e-4
    with pytest.raises(UserError, match="--stride is for overlapping windows"):
        evaluate_perplexity(subject, window=7, stride=3, carry_state=True)
