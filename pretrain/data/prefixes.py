"""Prefixes of the documents in a batch, and the loss of their hidden tokens (arXiv 2407.05483).

Layers may see a document's prefix as a whole (see :meth:`.Sequences.with_prefixes`), so of its
tokens the next one is predicted only for those after it, from the prefix's last token on. In
training some tokens of the prefix are hidden behind the mask token, and predicted where they lie.
The loss is the mean over next tokens, plus ``mask_weight`` times the mean over hidden tokens, which
is taken for each sample alone: no process has to know what others have hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pretrain.common.config_loader import ConfigError
from pretrain.config.data import PrefixConfig
from pretrain.data.batch import Batch
from pretrain.data.tokenizer import Tokenizer

_STREAM = 7  # apart from other numbers that are drawn from a seed and a sample's number


def generator_of(seed: int, first: int, sample: int) -> np.random.Generator:
    """Return what draws for sample ``sample`` of the data from step ``first`` on."""
    return np.random.default_rng([seed, first, sample, _STREAM])


def lengths_of_prefixes(config: PrefixConfig, lengths: Sequence[int]) -> list[int]:
    """Return the longest prefix of sequences of these ``lengths``."""
    return [min(config.tokens, int(config.fraction * n)) for n in lengths]


def with_prefixes(
    batch: Batch,
    config: PrefixConfig,
    tokenizer: Tokenizer,
    generators: Sequence[np.random.Generator] = (),
) -> Batch:
    """Return the batch with prefixes and their loss.

    ``generators`` are those of its samples, in training; without them prefixes are the longest, and
    nothing is hidden.
    """
    lengths = batch.sequences.lengths
    prefixes = np.array(lengths_of_prefixes(config, lengths), np.int64)
    starts = np.cumsum([0, *lengths[:-1]])
    samples = len(generators)
    length = batch.tokens.shape[1] // max(samples, 1)
    if config.length == "drawn":
        for number, generator in enumerate(generators):
            own = (starts >= number * length) & (starts < (number + 1) * length)
            prefixes[own] = generator.integers(0, prefixes[own] + 1)
    # The last token of a prefix predicts the first one after it, and is not hidden.
    inside = np.zeros(batch.tokens.shape[1], bool)
    for start, prefix in zip(starts.tolist(), prefixes.tolist(), strict=True):
        inside[start : start + max(prefix - 1, 0)] = True
    counted = batch.loss_mask[0].numpy() > 0
    mask = batch.loss_mask * torch.from_numpy(~inside)
    found = replace(
        batch, loss_mask=mask, sequences=batch.sequences.with_prefixes(prefixes.tolist())
    )
    if not config.hides or not samples:
        return found
    inputs, targets = batch.tokens.numpy()[0], batch.targets.numpy()[0].copy()
    may_hide = inside & counted & (inputs != tokenizer.eod_id)
    predicted = mask[0].numpy().reshape(samples, length).sum(1)
    masked, hidden = np.zeros(len(inputs), np.float32), inputs.copy()
    for number, generator in enumerate(generators):
        at = number * length + np.flatnonzero(may_hide[number * length : (number + 1) * length])
        chosen = generator.choice(at, round(config.mask_fraction * len(at)), replace=False)
        if len(chosen):
            masked[chosen] = config.mask_weight * predicted[number] / len(chosen)
            targets[chosen] = inputs[chosen]
            hidden[chosen] = config.mask_token(tokenizer.vocab_size)
    found.tokens, found.targets, found.masked = (
        torch.from_numpy(x[None]) for x in (hidden, targets, masked)
    )
    return found


def check_mask_token(config: PrefixConfig, rows: int, tokenizer: Tokenizer, where: str) -> None:
    """Raise ConfigError unless the mask token is a row of a vocabulary, and ends no document."""
    token = config.mask_token(tokenizer.vocab_size)
    if not config.hides:
        return
    if token >= rows:
        raise ConfigError(
            f"{where}: the mask token of data.prefix is id {token}, but model.vocab_size is "
            f"{rows}; expected a larger vocab_size, or a data.prefix.mask_id below it"
        )
    if token == tokenizer.eod_id:
        raise ConfigError(
            f"{where}: data.prefix.mask_id is {token}, which ends documents; expected another id"
        )
