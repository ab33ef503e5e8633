"""Prefixes of the documents in a batch: what is seen ahead, hidden, and predicted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.common.config_loader import ConfigError
from pretrain.config import DataConfig, PrefixConfig, TrainConfig
from pretrain.data.batches import TrainingBatches, open_data, pack_rows
from pretrain.data.prefixes import check_mask_token, generator_of, with_prefixes
from pretrain.data.validation import validation_batches

VOCAB, EOD, SEQ_LEN = 50, 7, 64
TOKENIZER: Any = SimpleNamespace(vocab_size=VOCAB, eod_id=EOD)
TRAIN = TrainConfig(steps=4, seq_len=SEQ_LEN, global_batch_tokens=8 * SEQ_LEN)


def rows(count=4):
    return np.random.default_rng(5).integers(0, VOCAB, (count, SEQ_LEN + 1))


def batch_of(numbers, **settings):
    plain = pack_rows(rows()[numbers], EOD)
    config = PrefixConfig(**{"tokens": 20, **settings})
    return plain, with_prefixes(plain, config, TOKENIZER, [generator_of(1, 0, n) for n in numbers])


@pytest.mark.parametrize("length", ["fixed", "drawn"])
def test_what_is_predicted_is_what_no_output_has_seen(length):
    plain, batch = batch_of([0, 1, 2, 3], length=length, mask_fraction=0.5, mask_weight=0.4)
    assert batch.masked is not None
    lengths, prefixes = batch.sequences.lengths, batch.sequences.prefixes
    assert lengths == plain.sequences.lengths
    assert prefixes is not None
    longest = [min(20, n // 2) for n in lengths]
    if length == "fixed":
        assert list(prefixes) == longest
    else:
        assert all(0 <= p <= most for p, most in zip(prefixes, longest, strict=True))
        assert len({p / most for p, most in zip(prefixes, longest, strict=True) if most > 3}) > 3
    hidden = (batch.masked[0] > 0).tolist()
    assert sum(hidden) > 10
    end = 0
    for n, prefix in zip(lengths, prefixes, strict=True):
        for at in range(n):
            token = end + at
            # The first token that is predicted is the one after the prefix.
            assert batch.loss_mask[0, token] == (at + 1 >= prefix)
            if hidden[token]:
                assert at + 1 < prefix
                assert batch.tokens[0, token] == VOCAB
                assert batch.targets[0, token] == plain.tokens[0, token] != EOD
            else:
                assert batch.tokens[0, token] == plain.tokens[0, token]
                assert batch.targets[0, token] == plain.targets[0, token]
        end += n
    # Of each sample, the weight of the mean over hidden tokens is that share of the other mean's.
    for mask, masked in zip(batch.loss_mask.view(4, -1), batch.masked.view(4, -1), strict=True):
        assert float(masked.sum()) == pytest.approx(0.4 * float(mask.sum()), rel=1e-6)


def test_a_sample_is_the_same_in_every_micro_batch():
    settings = {"length": "drawn"}
    _, whole = batch_of([0, 1, 2, 3], **settings)
    parts = [batch_of([n], **settings)[1] for n in range(4)]
    for name in ("tokens", "targets", "loss_mask", "masked"):
        together = torch.cat([getattr(part, name) for part in parts], 1)
        assert torch.equal(getattr(whole, name), together)
    assert whole.sequences.prefixes == sum((p.sequences.prefixes for p in parts), ())


@pytest.mark.parametrize("change", [{"mask_fraction": 0.0}, {"mask_weight": 0.0}])
def test_without_hidden_tokens_prefixes_are_read_as_they_are(change):
    plain, batch = batch_of([0, 1], **change)
    assert batch.masked is None
    assert torch.equal(batch.tokens, plain.tokens)
    assert 0 < batch.loss_mask.sum() < plain.loss_mask.sum()
    assert PrefixConfig(**change).ids(VOCAB) == VOCAB


def test_training_hides_tokens_and_validation_does_not(small_data):
    data = open_data(DataConfig(path=str(small_data)))
    prefix = PrefixConfig(tokens=16, length="drawn")
    found, again = (
        TrainingBatches(data, TRAIN, micro, 3, prefix).micro_batches(2) for micro in (4, 2)
    )
    assert all(batch.masked is not None for batch in found)
    for name in ("tokens", "targets", "masked"):
        one, other = (torch.cat([getattr(b, name) for b in bs], 1) for bs in (found, again))
        assert torch.equal(one, other)
    assert not torch.equal(
        found[0].tokens, TrainingBatches(data, TRAIN, 4, 4, prefix).micro_batches(2)[0].tokens
    )
    plain, with_them = (validation_batches(data, TRAIN, 2, 256, p) for p in (None, prefix))
    for source, batches in with_them.items():
        for batch, expected in zip(batches, plain[source], strict=True):
            assert batch.masked is None
            assert torch.equal(batch.tokens, expected.tokens)
            longest = tuple(min(16, n // 2) for n in batch.sequences.lengths)
            assert batch.sequences.prefixes == longest


@pytest.mark.parametrize(
    ("mask_id", "rows", "error"),
    [
        (None, 50, "mask token of data.prefix is id 50, but model.vocab_size is 50"),
        (60, 60, "mask token of data.prefix is id 60, but model.vocab_size is 60"),
        (EOD, 60, "data.prefix.mask_id is 7, which ends documents"),
    ],
)
def test_mask_tokens_that_do_not_fit_are_refused(mask_id, rows, error):
    with pytest.raises(ConfigError, match=error):
        check_mask_token(PrefixConfig(mask_id=mask_id), rows, TOKENIZER, "test")
    check_mask_token(PrefixConfig(mask_id=49), rows, TOKENIZER, "test")
