"""The windows that validation scores: always the same, every source in its share."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.config import DataConfig, DataSource, TrainConfig
from pretrain.data.batches import open_data
from pretrain.data.validation import (
    ValidationScore,
    mean_score,
    share_of,
    validation_batches,
    validation_of_phases,
)

CONFIG = TrainConfig(steps=1, seq_len=16, global_batch_tokens=64)


def tokens_of(batches):
    return np.concatenate([b.tokens[0].numpy() for b in batches])


def test_validation_is_always_the_same(corpus):
    data = open_data(DataConfig(path=str(corpus)))
    found, again = (validation_batches(data, CONFIG, 2, 100) for _ in range(2))
    assert list(found) == ["code"]
    assert len(tokens_of(found["code"])) == 96  # six samples of 16
    assert np.array_equal(tokens_of(found["code"]), tokens_of(again["code"]))


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 9)])
def test_every_source_has_its_share_in_windows_spread_over_its_text(corpus, other_corpus, weights):
    paths = (corpus, other_corpus)
    blend = [DataSource(str(p), float(w)) for p, w in zip(paths, weights, strict=True)]
    data = open_data(DataConfig(blend=blend))
    found = validation_batches(data, CONFIG, 3, 40 * 16)
    for label, weight, stream in zip(data.labels, weights, data.valid, strict=True):
        rows = tokens_of(found[label]).reshape(-1, 16)
        available = (len(stream) - 1) // 16
        assert len(rows) == min(40 * weight // sum(weights), available)
        text = stream.read(0, 16 * available).reshape(-1, 16)
        at = [i * available // len(rows) for i in range(len(rows))]
        assert np.array_equal(rows, text[at])


def test_sources_of_phases_are_scored_beside_those_of_the_run(corpus, other_corpus):
    data, other = (open_data(DataConfig(path=str(p))) for p in (corpus, other_corpus))
    both = open_data(DataConfig(blend=[DataSource(str(corpus)), DataSource(str(other_corpus), 3)]))
    alone = validation_batches(data, CONFIG, 2, 100)
    found, shares = validation_of_phases(data, [data, both, other], CONFIG, 2, 100)
    label = other.sources[0]  # of the same name as the run's
    assert list(found) == ["code", label]
    assert np.array_equal(tokens_of(found["code"]), tokens_of(alone["code"]))
    assert len(tokens_of(found[label])) == 80  # three quarters of 100, in windows of 16
    assert shares == [{"code": 1.0}, {"code": 1.0, label: 3.0}, {label: 1.0}]


def test_ranks_have_as_many_batches_each_and_count_every_token_once(corpus):
    batches = validation_batches(open_data(DataConfig(str(corpus))), CONFIG, 2, 100)["code"]
    shares = [share_of(batches, rank, 2) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 2
    assert sum(int(b.loss_mask.sum()) for share in shares for b in share) == 96
    assert share_of([], 0, 2) == []


def test_scores_of_sources_add_up_to_that_of_all_tokens():
    one, other = ValidationScore(3.0, 30, 100), ValidationScore(5.0, 10, 60)
    total = mean_score([one, other])
    assert (total.loss, total.tokens, total.bytes) == (3.5, 40, 160)
    assert total.bits_per_byte == pytest.approx(140 / math.log(2) / 160)
    assert mean_score([one]) is one
    assert mean_score([ValidationScore(3.0, 30, 0)]).bits_per_byte is None
