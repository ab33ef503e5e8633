"""Sliding windows score every target once, and packing changes no figure."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from evals.held_out import Documents, Window, ratio, sample
from evals.perplexity import evaluate_perplexity, score
from pretrain.common.errors import UserError
from pretrain.config import DataConfig, DataSource, TrainConfig
from pretrain.data.batches import open_data
from pretrain.data.manifest import Manifest
from pretrain.data.shards import TokenStream
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.validation import validation_batches
from pretrain.model.build import build_model
from tests.helpers.small_model import VOCAB, settings

pytestmark = pytest.mark.usefixtures("processes")


class Stream(TokenStream):
    """A token stream of documents, each of the ids from 1 on."""

    def __init__(self, lengths):
        super().__init__([])
        self.ids = np.concatenate([np.arange(1, n + 1) for n in lengths])
        self._lengths = np.array(lengths)

    def __len__(self):
        return len(self.ids)

    def document_lengths(self):
        return self._lengths

    def read(self, start, count):
        return self.ids[start : start + count]


@given(st.lists(st.integers(1, 60), min_size=1), st.integers(1, 20), st.integers(1, 20))
def test_every_target_is_scored_once_with_its_context(lengths, window, stride):
    stride = min(stride, window)
    documents = Documents(Stream(lengths), opening_id=0, window=window, stride=stride)
    scored: list[list[int]] = [[] for _ in lengths]
    for number in range(documents.num_windows):
        w, of = documents.window(number), scored[documents.document_of(number)]
        assert len(w.inputs) <= window
        assert np.array_equal(w.inputs + 1, w.targets)  # inputs are the targets' predecessors
        context = len(w.targets) - w.scored
        assert not of or context >= min(window - stride, len(of))
        of += w.targets[-w.scored :].tolist()
    assert scored == [list(range(1, n + 1)) for n in lengths]
    assert documents.num_tokens == sum(lengths)


def test_packing_changes_nothing():
    model = build_model(settings(), VOCAB, seed=0, dtype=torch.float64)
    documents = [np.random.default_rng(i).integers(1, VOCAB, n) for i, n in enumerate((30, 1, 17))]
    every = [
        Window(
            np.concatenate([[0], d[: len(d) - 1]])[s : s + 16], d[s : s + 16], min(8, len(d) - s)
        )
        for d in documents
        for s in range(0, len(d), 8)
    ]
    together = np.concatenate(score(model, every))
    alone = np.concatenate([score(model, [w])[0] for w in every])
    assert np.allclose(together, alone, rtol=1e-6)


def loaded(corpus, window=16):
    tokenizer = Tokenizer.load(corpus)
    vocab_size = 384
    model = build_model(settings(), vocab_size, seed=0, dtype=torch.float64).eval()
    return SimpleNamespace(
        reader=model,
        exits=None,
        model=model,
        tokenizer=tokenizer,
        opening_id=tokenizer.eod_id,
        opening="the end-of-document token",
        checkpoint="here",
        run=SimpleNamespace(
            train=SimpleNamespace(seq_len=window),
            data=DataConfig(str(corpus)),
            parallel=SimpleNamespace(micro_batch_size=3),
            validation=SimpleNamespace(tokens=20 * window),
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
        dataset = IndexedDataset(str(corpus / shard.name))
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
    subject.run.data = DataConfig()
    with pytest.raises(UserError, match="has no training data: give --data"):
        evaluate_perplexity(subject)
    assert evaluate_perplexity(subject, data=str(corpus), max_tokens=1)["tokens"] > 0


def blended(corpus, other_corpus, weights=(1.0, 1.0)):
    subject = loaded(corpus)
    paths = (corpus, other_corpus)
    subject.run.data = DataConfig(
        blend=[DataSource(str(p), w) for p, w in zip(paths, weights, strict=True)]
    )
    return subject


def test_a_blend_is_scored_in_all_and_by_source(corpus, other_corpus):
    subject = blended(corpus, other_corpus, (3.0, 1.0))
    result = evaluate_perplexity(subject)
    alone = [evaluate_perplexity(loaded(corpus), data=str(d)) for d in (corpus, other_corpus)]
    for source, one in zip(result["sources"], alone, strict=True):
        for name in ("nats_per_token", "bits_per_byte"):
            assert source[name] == pytest.approx(one[name], rel=1e-9)
        for name in ("documents", "tokens", "bytes"):
            assert source[name] == one[name] and source[name] > 0
        assert one["stderr"] == {"bits_per_byte": None, "nats_per_token": None}
    tokens = [one["tokens"] for one in alone]
    nats = [one["nats_per_token"] for one in alone]
    assert result["tokens"] == sum(tokens)
    assert result["nats_per_token"] == pytest.approx(np.dot(nats, tokens) / sum(tokens))
    assert [s["weight"] for s in result["sources"]] == [0.75, 0.25]
    weighted = result["nats_per_token_by_training_weights"]
    assert weighted == pytest.approx(0.75 * nats[0] + 0.25 * nats[1])


def test_a_directory_named_twice_is_scored_once(corpus):
    subject, twice = loaded(corpus), loaded(corpus)
    twice.run.data = DataConfig(blend=[DataSource(str(corpus)), DataSource(str(corpus), 2.0)])
    once, again = evaluate_perplexity(subject), evaluate_perplexity(twice)
    assert once == again


def test_a_sample_is_the_mean_of_the_windows_that_it_draws(corpus, other_corpus):
    """Each of them scored alone, and weighted by how many of its source it stands for."""
    subject = blended(corpus, other_corpus)
    result = evaluate_perplexity(subject, max_tokens=300, seed=5)
    again = evaluate_perplexity(subject, max_tokens=300, seed=5)
    assert result == again
    assert result["tokens"] == pytest.approx(300, rel=0.3)
    other = evaluate_perplexity(subject, max_tokens=300)
    assert (other["seed"], result["seed"]) == (0, 5)
    assert other["nats_per_token"] != result["nats_per_token"]
    data, bytes_per_token = open_data(subject.run.data), subject.tokenizer.bytes_per_token()
    sources = [Documents(stream, data.tokenizer.eod_id, 16, 8) for stream in data.valid]
    sizes = [(source.num_windows, source.num_tokens) for source in sources]
    nats, tokens = [], []
    for source, numbers, found in zip(
        sources, sample(sizes, 300, 5), result["sources"], strict=True
    ):
        drawn = [source.window(number) for number in numbers]
        nats.append(np.array([score(subject.model, [w])[0].sum() for w in drawn]))
        tokens.append(np.array([float(w.scored) for w in drawn]))
        assert found["nats_per_token"] == pytest.approx(nats[-1].sum() / tokens[-1].sum(), rel=1e-6)
        assert found["tokens"] == tokens[-1].sum()
        ids = np.concatenate([w.targets[-w.scored :] for w in drawn])
        assert found["bytes"] == bytes_per_token[ids].sum()
    value, error = ratio([(x, y, n) for x, y, (n, _) in zip(nats, tokens, sizes, strict=True)])
    assert result["nats_per_token"] == pytest.approx(value, rel=1e-6)
    assert result["stderr"]["nats_per_token"] == pytest.approx(error, rel=1e-4)
    whole = evaluate_perplexity(subject)
    apart = result["nats_per_token"] - whole["nats_per_token"]
    assert abs(apart) < 5 * result["stderr"]["nats_per_token"]
    assert evaluate_perplexity(subject, max_tokens=10**9) == {
        **whole,
        "max_tokens": 10**9,
        "seed": 0,
    }


def test_documents_are_drawn_whole_where_the_state_is_carried(corpus):
    subject = loaded(corpus)
    result = evaluate_perplexity(subject, window=8, carry_state=True, max_tokens=300)
    (stream,) = open_data(subject.run.data).valid
    lengths = stream.document_lengths()
    (numbers,) = sample([(len(lengths), int(lengths.sum()))], 300, 0)
    assert result["documents"] == len(numbers) < len(lengths)
    assert result["tokens"] == lengths[numbers].sum()
    assert result["stderr"]["nats_per_token"] > 0


@pytest.mark.parametrize("budget", [500, 1000, 5000])
def test_samples_spread_around_all_of_it_as_their_standard_error_says(budget):
    """Of three sources that differ, where the first ones would be far off."""
    rng = np.random.default_rng(0)
    sources = []
    for number, mean in ((400, 2.0), (150, 5.0), (40, 3.0)):
        tokens = rng.integers(1, 30, number).astype(float)
        sources.append((tokens * (mean + rng.normal(0, 1, number)), tokens))
    sizes = [(len(x), int(y.sum())) for x, y in sources]
    whole = sum(x.sum() for x, _ in sources) / sum(y.sum() for _, y in sources)
    found, errors, drawn = [], [], []
    for seed in range(400):
        chosen = sample(sizes, budget, seed)
        strata = [(x[c], y[c], len(x)) for (x, y), c in zip(sources, chosen, strict=True)]
        value, error = ratio(strata)
        found.append(value)
        errors.append(error or 0.0)
        drawn.append(sum(y.sum() for _, y, _ in strata))
    assert np.mean(drawn) == pytest.approx(budget, rel=0.1)
    assert np.std(found) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.15)
    assert np.mean(found) == pytest.approx(whole, abs=float(0.2 * np.std(found)))


@given(
    st.lists(st.tuples(st.integers(2, 500), st.integers(1, 30)), min_size=1, max_size=5),
    st.integers(1, 5000),
)
def test_the_share_of_a_source_is_that_of_its_windows(sources, max_tokens):
    sizes = [(windows, windows * length) for windows, length in sources]
    chosen = sample(sizes, max_tokens, seed=0)
    for (windows, _), numbers in zip(sizes, chosen, strict=True):
        assert len(set(numbers.tolist())) == len(numbers) and numbers.max() < windows
        total = sum(t for _, t in sizes)
        wanted = max_tokens * windows / total
        assert len(numbers) == windows if max_tokens >= total else True
        assert abs(len(numbers) - min(max(wanted, 2), windows)) <= 0.5


def test_the_windows_of_validation_in_training(corpus, other_corpus):
    """By hand: rows of the stream, with resets where documents begin."""
    subject = blended(corpus, other_corpus, (1.0, 3.0))
    result = evaluate_perplexity(subject, training_windows=True)
    data = open_data(subject.run.data)
    found = validation_batches(data, TrainConfig(seq_len=16), 5, 20 * 16)
    total = []
    for source, label in zip(result["sources"], data.labels, strict=True):
        losses = [subject.model(b.tokens, b.targets, sequences=b.sequences) for b in found[label]]
        nats = torch.cat([x[0] for x in losses])
        total.append(nats)
        assert source["tokens"] == len(nats)
        assert source["nats_per_token"] == pytest.approx(float(nats.detach().mean()), rel=1e-6)
    assert result["nats_per_token"] == pytest.approx(float(torch.cat(total).detach().mean()))
    assert result["tokens"] == 20 * 16
    for other in ({"window": 8}, {"stride": 3}, {"carry_state": True}, {"max_tokens": 9}):
        with pytest.raises(UserError, match="does not go with --training-windows"):
            evaluate_perplexity(subject, training_windows=True, **other)
    with pytest.raises(UserError, match="--seed is 3, but only --max-tokens draws"):
        evaluate_perplexity(subject, seed=3)


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
