"""Rows that read on from step to step: one text per row, every source in its share."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.config import DataConfig, DataSource, TrainConfig
from pretrain.data.batches import TrainingBatches, open_data, pack_rows

CONFIG = TrainConfig(steps=1, seq_len=16, global_batch_tokens=64, carry_state=True, carry_steps=6)
ROWS = 4


@pytest.fixture(scope="module")
def data(corpus):
    return open_data(DataConfig(path=str(corpus)))


def rows_of(batches, step, size=1, micro=2):
    """[(tokens, next token, whether it continues)] of the step's rows, from all processes."""
    ranks = [batches.micro_batches(step, rank, size) for rank in range(size)]
    return [
        (tokens, int(targets[-1]), continues)
        for group in zip(*ranks, strict=True)
        for batch in group
        for tokens, targets, continues in zip(
            batch.tokens.view(micro, -1),
            batch.targets.view(micro, -1),
            batch.continues,
            strict=True,
        )
    ]


def test_a_row_reads_on_for_its_steps_and_rows_go_elsewhere_in_turn(data):
    batches = TrainingBatches(data, CONFIG, 2, 5)
    stream, eod = data.train[0], data.tokenizer.eod_id
    jumps = []
    for step in range(1, 30):
        for row in range(ROWS):
            (_, before), (_, here) = (batches.locate(s * ROWS + row) for s in (step - 1, step))
            reads_on = (step + (ROWS - 1 - row) * 6 // ROWS) % 6 > 0
            tokens, _, continues = rows_of(batches, step)[row]
            assert torch.equal(tokens, torch.from_numpy(stream.read(here * 16, 16)))
            assert continues == (reads_on and tokens[0] != eod)
            if reads_on:
                assert here == before + 1
            else:
                jumps.append((step, row))
    assert jumps[:5] == [(2, 0), (3, 1), (5, 2), (6, 3), (8, 0)]


def test_a_document_that_begins_with_a_row_continues_nothing():
    rows = np.array([[7, 1, 2], [3, 7, 7], [4, 4, 4]])
    assert pack_rows(rows, 7, [True, True, False]).continues == (False, True, False)
    assert pack_rows(rows, 7).continues is None


@pytest.mark.parametrize(("size", "micro"), [(2, 1), (2, 2), (4, 1)])
def test_rows_do_not_depend_on_the_processes(data, size, micro):
    whole = TrainingBatches(data, CONFIG, 2, 3)
    parts = TrainingBatches(data, CONFIG, micro, 3)
    for step in (0, 1, 7):
        found = rows_of(parts, step, size, micro)
        for row, other in zip(rows_of(whole, step), found, strict=True):
            assert torch.equal(row[0], other[0])
            assert row[1:] == other[1:]


def test_an_epoch_reads_every_span_once_and_the_next_in_another_order(data):
    batches = TrainingBatches(data, CONFIG, 2, 0)
    spans = batches.samples[0] // 6
    firsts = {}
    for index in range(3 * batches.samples[0]):
        span, place = batches.order.span(batches.mix_at(0), index)
        if place == 5:
            firsts[span] = batches.locate(index)[1] - 5
    epochs = [[firsts[s] for s in range(e * spans, (e + 1) * spans)] for e in range(2)]
    for starts in epochs:
        assert sorted(b - a for a, b in zip(sorted(starts), sorted(starts)[1:], strict=False)) == (
            [6] * (spans - 1)
        )
    assert epochs[0] != epochs[1]


def test_sources_have_their_shares(corpus, other_corpus):
    blend = [DataSource(str(corpus), 3), DataSource(str(other_corpus), 1)]
    batches = TrainingBatches(open_data(DataConfig(blend=blend)), replace(CONFIG, seq_len=8), 2, 0)
    steps = 96
    seen = Counter(batches.locate(i)[0] for i in range(steps * 8))
    assert seen[0] / (steps * 8) == pytest.approx(0.75, abs=6 * 2 / steps)


def test_a_source_with_too_little_text_is_refused(data):
    count = (len(data.train[0]) - 1) // 16
    message = f"{count} samples of train.seq_len, too few for train.carry_steps = 100000; expected"
    with pytest.raises(UserError, match=message):
        TrainingBatches(data, replace(CONFIG, carry_steps=100_000), 2, 0)
