"""Validation: which windows of the held-out text are scored while training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pretrain.config import PrefixConfig, TrainConfig
from pretrain.data.batch import Batch
from pretrain.data.batches import PreparedData, pack_rows
from pretrain.data.prefixes import with_prefixes


@dataclass(frozen=True)
class ValidationScore:
    """The mean loss, in nats, of so many tokens that stand for so many bytes of text.

    The bytes are 0 where they are not known.
    """

    loss: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float | None:
        """Return the bits per byte of text, None where its bytes are not known."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None


def mean_score(scores: Iterable[ValidationScore]) -> ValidationScore:
    """Return the score of all tokens together."""
    first, *others = scores
    if not others:
        return first
    tokens = first.tokens + sum(s.tokens for s in others)
    nats = math.fsum(s.loss * s.tokens for s in (first, *others))
    return ValidationScore(nats / max(tokens, 1), tokens, sum(s.bytes for s in (first, *others)))


def share_of(batches: list[Batch], rank: int, size: int) -> list[Batch]:
    """Return the batches of data-parallel rank ``rank`` of ``size``, equally many for each rank.

    They are filled up with batches that count nothing, because all ranks must go through the model
    together.
    """
    if not batches:
        return []
    last = batches[-1]
    empty = Batch(last.tokens, last.targets, torch.zeros_like(last.loss_mask), last.sequences)
    return [*batches, *[empty] * (-len(batches) % size)][rank::size]


def validation_of_phases(
    data: PreparedData,
    phases: Sequence[PreparedData],
    config: TrainConfig,
    micro_batch_size: int,
    tokens: int,
    prefix: PrefixConfig | None = None,
) -> tuple[dict[str, list[Batch]], list[dict[str, float]]]:
    """Return :func:`validation_batches` of the run's and all phases' sources, and phases' shares.

    What a phase adds to the run's sources has its share of ``tokens`` there; the shares of each
    phase are by label. A source of the same name as another has its hash in its label.
    """
    labels = dict(zip(data.sources, data.labels, strict=True))
    batches = validation_batches(data, config, micro_batch_size, tokens, prefix)
    shares = []
    for phase in phases:
        own = validation_batches(phase, config, micro_batch_size, tokens, prefix)
        for source, label in zip(phase.sources, phase.labels, strict=True):
            if source not in labels:
                labels[source] = source if label in labels.values() else label
                if label in own:
                    batches[labels[source]] = own[label]
        weights = zip(phase.sources, phase.weights, strict=True)
        shares.append({labels[source]: weight for source, weight in weights})
    return batches, shares


def validation_batches(
    data: PreparedData,
    config: TrainConfig,
    micro_batch_size: int,
    tokens: int,
    prefix: PrefixConfig | None = None,
) -> dict[str, list[Batch]]:
    """Return about ``tokens`` tokens in windows of ``seq_len``, by the label of their source.

    With ``prefix`` documents have prefixes, of which none but the last token predicts.

    Every source has its share by weight, of windows at equal distances in its validation split; one
    with less text has all of it, one without a window is left out.
    """
    batches: dict[str, list[Batch]] = {}
    total = sum(data.weights)
    for label, stream, weight in zip(data.labels, data.valid, data.weights, strict=True):
        available = (len(stream) - 1) // config.seq_len
        wanted = max(round(tokens * weight / total / config.seq_len), 1)
        count = min(available, wanted)
        samples = [i * available // count for i in range(count)]
        rows = [stream.read(i * config.seq_len, config.seq_len + 1) for i in samples]
        chunks = [rows[i : i + micro_batch_size] for i in range(0, count, micro_batch_size)]
        if chunks:
            packed = (pack_rows(np.stack(c), data.tokenizer.eod_id) for c in chunks)
            batches[label] = [
                b if prefix is None else with_prefixes(b, prefix, data.tokenizer) for b in packed
            ]
    return batches
