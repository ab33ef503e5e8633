"""Segments of packed rows: which pieces lie in them, and what is known of the others."""

from __future__ import annotations

import random

import pytest
import torch

from pretrain.data.sequences import Sequences, segment_of


def in_prefix(sequences):
    """Of each token, whether it is one of a prefix."""
    parts = zip(sequences.lengths, sequences.prefixes, strict=True)
    return [at < prefix for length, prefix in parts for at in range(length)]


@pytest.mark.parametrize("seed", range(20))
def test_segments_are_the_row(seed):
    draw = random.Random(seed)
    size = draw.choice((1, 2, 3, 4, 8))
    total = size * draw.randint(1, 40)
    cuts = sorted(draw.sample(range(1, total), min(draw.randint(0, 9), total - 1)))
    if draw.random() < 0.5:
        cuts = [*cuts, *cuts[:1], total]  # empty sequences
        cuts.sort()
    row = Sequences(torch.tensor([0, *cuts, total]))
    row = row.with_prefixes([draw.randint(0, length) for length in row.lengths])
    parts = [segment_of(row, rank, size) for rank in range(size)]
    assert torch.cat([part.positions for part in parts]).tolist() == row.positions.tolist()
    assert [x for part in parts for x in in_prefix(part)] == in_prefix(row)
    for rank, part in enumerate(parts):
        segment, first = part.segment, parts[0].segment
        assert segment is not None
        assert first is not None
        assert part.num_tokens == total // size
        assert 0 not in part.lengths
        assert segment.seen == part.positions[0]
        assert segment.continues[rank] == (segment.seen > 0)
        assert segment.through[rank] == bool((part.positions > 0).all())
        assert (segment.continues, segment.through) == (first.continues, first.through)
        assert part.to("cpu").segment is segment
        assert part.to("meta").prefixes == part.prefixes


def test_a_size_that_does_not_divide_the_tokens_is_refused():
    with pytest.raises(ValueError, match="a row of 10 tokens cannot be cut into 4 segments"):
        segment_of(Sequences.from_lengths([10]), 0, 4)


@pytest.mark.parametrize("prefixes", [[1], [1, 5], [-1, 2]])
def test_prefixes_that_do_not_fit_are_refused(prefixes):
    with pytest.raises(ValueError, match=r"prefixes are .*, expected one for each of 2 sequences"):
        Sequences.from_lengths([3, 4]).with_prefixes(prefixes)
