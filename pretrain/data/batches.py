"""Token shards to batches. A batch is a pure function of (seed, step), whatever the processes.

The shards of one source form one stream of tokens, cut into samples of ``seq_len`` tokens (and the
one after, as the last target). Sample i of the run belongs to one source, chosen so that after any
number of samples every source has its share to within as many samples as there are sources; within
a source the samples come in a pseudorandom order that is a new one every epoch. Nothing is stored:
the loader's state is the number of the step.

With ``train.carry_state`` rows read on instead: row r of a step continues row r of the step before,
through a span of ``train.carry_steps`` samples of one source, and then goes to another span. Spans
are dealt as samples are else, and rows reach the end of theirs in turn, not all at one step.

The end-of-document token opens the next document: it is the first input of every document, so each
token of a document is predicted once, from that document alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.config import DataConfig, TrainConfig
from pretrain.data.manifest import Manifest
from pretrain.data.sequences import Sequences, segment_of, without_waiting
from pretrain.data.shards import Shard, TokenStream
from pretrain.data.tokenizer import Tokenizer


@dataclass
class Batch:
    """One micro-batch, all sequences packed in a row of T tokens.

    Attributes:
        tokens: ``[1, T]`` int64.
        targets: ``[1, T]`` int64, the token after each.
        loss_mask: ``[1, T]`` float32, 1 where the target counts.
        sequences: The documents, or pieces of documents, that the row is packed of.
        continues: Where rows read on from step to step: of each, whether its first document is that
            in which the same row of the step before ended.
    """

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    sequences: Sequences
    continues: tuple[bool, ...] | None = None

    @property
    def cu_seqlens(self) -> Tensor:
        """Return ``[N + 1]`` int64: 0, then where each of the N sequences ends."""
        return self.sequences.cu_seqlens

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``, without waiting for it."""
        tokens, targets, mask = (
            without_waiting(x, device) for x in (self.tokens, self.targets, self.loss_mask)
        )
        return Batch(tokens, targets, mask, self.sequences.to(device), self.continues)

    def segment(self, rank: int, size: int, group: Any = None) -> Batch:
        """Return segment ``rank`` of ``size`` of the row; see :func:`.segment_of`."""
        sequences = segment_of(self.sequences, rank, size, group)
        length = sequences.num_tokens
        tokens, targets, mask = (
            x[:, rank * length : (rank + 1) * length]
            for x in (self.tokens, self.targets, self.loss_mask)
        )
        return Batch(tokens, targets, mask, sequences)

    def pinned(self) -> Batch:
        """Return the batch in pinned memory, from which :meth:`to` copies at once."""
        tokens, targets, mask = (
            x.pin_memory() for x in (self.tokens, self.targets, self.loss_mask)
        )
        return Batch(tokens, targets, mask, self.sequences.pinned(), self.continues)


@dataclass
class PreparedData:
    """The data of a run: its tokenizer, and per source its name, weight, and streams by split.

    A source's name is ``NAME@HASH`` of its content: where the folder is does not matter, and what
    is named twice is one source, with both weights.
    """

    tokenizer: Tokenizer
    sources: list[str]
    weights: list[float]
    train: list[TokenStream]
    valid: list[TokenStream]
    bigram_entropy: float

    @property
    def identity(self) -> list[str]:
        """Return what the order of samples depends on besides the seed."""
        return [f"{n} x {w:.6g}" for n, w in zip(self.sources, self.weights, strict=True)]

    @property
    def labels(self) -> list[str]:
        """Return a name for every source: its own, with the hash where two have the same."""
        names = [source.rsplit("@", 1)[0] for source in self.sources]
        return [
            name if names.count(name) == 1 else source
            for name, source in zip(names, self.sources, strict=True)
        ]


def open_data(config: DataConfig) -> PreparedData:
    """Open everything that the settings name. Raises UserError where it does not fit together."""
    directories = config.directories
    tokenizer: Tokenizer | None = None
    data: PreparedData | None = None
    entropies = []
    for part in directories:
        path, share = part.path, part.weight
        directory, manifest = Path(path), Manifest.load(path)
        manifest.verify_sizes(directory)
        found = Tokenizer.load(directory / manifest.tokenizer.file)
        if found.sha256 != manifest.tokenizer.sha256:
            raise UserError(
                f"{directory / manifest.tokenizer.file} is not the tokenizer that made the shards: "
                f"its sha256 is {found.sha256[:12]}..., the manifest says "
                f"{manifest.tokenizer.sha256[:12]}...; make the shards again"
            )
        if tokenizer is None or data is None:
            tokenizer = found
            data = PreparedData(found, [], [], [], [], 0.0)
        elif found.sha256 != tokenizer.sha256:
            raise UserError(
                f"data.blend: {path} was made with another tokenizer ({found.sha256[:12]}...) than "
                f"{directories[0].path} ({tokenizer.sha256[:12]}...); one run needs one tokenizer: "
                f"prepare it with tokenizer: {{path: {directories[0].path}}}"
            )
        weights = _source_weights(manifest, part.weights, path)
        total = sum(weights.values())
        for source in manifest.sources:
            if weights[source.name] == 0:
                continue
            name = f"{source.name}@{manifest.content_sha256[:16]}"
            weight = share * weights[source.name] / total
            if name in data.sources:  # the same text again: one pass through it, not two at once
                data.weights[data.sources.index(name)] += weight
                continue
            shards = {
                split: [
                    Shard(directory / s.name, found.vocab_size)
                    for s in manifest.shards
                    if s.source == source.name and s.split == split
                ]
                for split in ("train", "valid")
            }
            data.sources.append(name)
            data.weights.append(weight)
            data.train.append(TokenStream(shards["train"]))
            data.valid.append(TokenStream(shards["valid"]))
        entropies.append((share, manifest.byte_entropy.bigram))
    if data is None:
        raise UserError("the config names no data: set data.path")
    data.bigram_entropy = sum(w * e for w, e in entropies) / sum(w for w, _ in entropies)
    return data


def _source_weights(manifest: Manifest, chosen: dict[str, float], path: str) -> dict[str, float]:
    """Return the weights of a directory's sources, the run's own before the manifest's."""
    weights = {source.name: source.weight for source in manifest.sources}
    for name in chosen:
        if name not in weights:
            raise UserError(
                f"the data's weights name '{name}', which is no source of {path}; it has "
                f"{', '.join(weights)}"
            )
    weights |= chosen
    if not any(weights.values()):
        raise UserError(
            f"the data's weights leave out every source of {path}, expected one above 0"
        )
    return weights


class TrainingBatches:
    """The micro-batches of every step, a function of (seed, step, rank, world size) alone."""

    def __init__(self, data: PreparedData, config: TrainConfig, micro_batch_size: int, seed: int):
        self.config, self.micro_batch_size, self.seed = config, micro_batch_size, seed
        self.eod_id = data.tokenizer.eod_id
        self.streams, self.names = data.train, data.sources
        total = sum(Fraction(w) for w in data.weights)
        self.weights = [Fraction(w) / total for w in data.weights]
        self.samples = [(len(stream) - 1) // config.seq_len for stream in data.train]
        for name, stream, count in zip(data.sources, data.train, self.samples, strict=True):
            if count < 1:
                raise UserError(
                    f"{name}: its training split has {len(stream)} tokens, fewer than one sample "
                    f"of train.seq_len + 1 = {config.seq_len + 1}"
                )
            if config.carry_state and count < config.carry_steps:
                raise UserError(
                    f"{name}: its training split has {count} samples of train.seq_len, too few for "
                    f"train.carry_steps = {config.carry_steps}; expected at most {count}"
                )

    def micro_batches(
        self, step: int, rank: int = 0, size: int = 1, *, offset: int = 0
    ) -> list[Batch]:
        """Return the micro-batches of one step for data-parallel rank ``rank`` of ``size``.

        ``offset``: tokens of data skipped before the step.
        """
        length, micro = self.config.seq_len, self.micro_batch_size
        first = (self.config.tokens_before(step) + offset) // length
        per_step = self.config.batch_tokens(step) // length
        batches = []
        for start in range(first + rank * micro, first + per_step, size * micro):
            batches.append(self._batch(range(start, start + micro)))
        return batches

    def _batch(self, indices: range) -> Batch:
        length = self.config.seq_len
        rows = []
        for index in indices:
            source, number = self.locate(index)
            rows.append(self.streams[source].read(number * length, length + 1))
        if not self.config.carry_state:
            return pack_rows(np.stack(rows), self.eod_id)
        goes_on = [self._span(index)[1] > 0 for index in indices]
        return pack_rows(np.stack(rows), self.eod_id, goes_on)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, sample of that source's stream) of the run's sample ``index``."""
        size, place = 1, 0
        if self.config.carry_state:
            size = self.config.carry_steps
            index, place = self._span(index)
        source, position = blend(index, self.weights)
        count, rest = divmod(self.samples[source], size)
        epoch, position = divmod(position, count)
        key = hashlib.sha256(f"{self.seed}:{self.names[source]}:{epoch}".encode()).digest()
        # What spans leave over is not always the same.
        shift = int.from_bytes(key[:8], "little") % (rest + 1)
        return source, shift + permute(position, count, key) * size + place

    def _span(self, index: int) -> tuple[int, int]:
        """Return the number of the span that sample ``index`` is of, and its place in there.

        Rows begin their spans in the order of the rows, at equal distances in steps.
        """
        rows = self.config.global_batch_tokens // self.config.seq_len
        step, row = divmod(index, rows)
        size = self.config.carry_steps
        turn, place = divmod(step + (rows - 1 - row) * size // rows, size)
        return turn * rows + row, place

    def epochs(self, step: int, *, offset: int = 0) -> list[float]:
        """Return how often each source has been seen when ``step`` steps are done."""
        seen = (self.config.tokens_before(step) + offset) // self.config.seq_len
        return [float(seen * w / n) for w, n in zip(self.weights, self.samples, strict=True)]


def blend(index: int, weights: Sequence[Fraction]) -> tuple[int, int]:
    """Return (source, position within it) of sample ``index``; ``weights`` sum to 1.

    The first source takes sample i whenever floor(w (i + 1)) > floor(w i), the others share the
    rest in the same way: for any prefix, every share is exact to within len(weights) samples.
    """
    rest = Fraction(1)
    for source, weight in enumerate(weights[:-1]):
        share = weight / rest
        before, after = index * share, (index + 1) * share
        taken = before.numerator // before.denominator
        if after.numerator // after.denominator > taken:
            return source, taken
        index, rest = index - taken, rest - weight
    return len(weights) - 1, index


def permute(position: int, count: int, key: bytes) -> int:
    """Return the image of ``position`` under a pseudorandom permutation of ``range(count)``.

    A Feistel network of four rounds on the next power of four, walked along its cycle until the
    value falls below ``count``.
    """
    half = max((count - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for r in range(4):
            text = key + bytes([r]) + right.to_bytes(8, "little")
            digest = hashlib.blake2b(text, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        position = left << half | right
        if position < count:
            return position


def pack_rows(rows: np.ndarray, eod_id: int, goes_on: Sequence[bool] | None = None) -> Batch:
    """Pack rows ``[B, T + 1]`` of a token stream as one packed micro-batch.

    Every end-of-document token among the inputs opens a sequence, and so does every row.
    ``goes_on``: of each row, whether it reads on where that of the step before ended.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    starts = inputs == eod_id
    continues = None
    if goes_on is not None:
        continues = tuple((np.array(goes_on) & ~starts[:, 0]).tolist())
    starts[:, 0] = True
    ends = np.append(np.flatnonzero(starts.reshape(-1)), inputs.size)
    return Batch(
        tokens=torch.from_numpy(inputs.reshape(1, -1).copy()),
        targets=torch.from_numpy(targets.reshape(1, -1).copy()),
        loss_mask=torch.ones(1, inputs.size),
        sequences=Sequences(torch.from_numpy(ends.astype(np.int64))),
        continues=continues,
    )
