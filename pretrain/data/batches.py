"""Token shards to batches. A batch is a pure function of (seed, step), whatever the processes.

The shards of one source form one stream of tokens, cut into samples of ``seq_len`` tokens (and the
one after, as the last target). Sample i of the run belongs to one source, chosen so that after any
number of samples every source has its share to within as many samples as there are sources; within
a source the samples come in a pseudorandom order that is a new one every epoch, see order.py.
Nothing is stored: the loader's state is the number of the step.

With ``train.carry_state`` rows read on instead: row r of a step continues row r of the step before,
through a span of ``train.carry_steps`` windows of one source, and then goes to another span. Spans
are dealt as samples are else, and rows reach the end of theirs in turn, not all at one step.

The end-of-document token opens the next document: it is the first input of every document, so each
token of a document is predicted once, from that document alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from pretrain.common.errors import UserError
from pretrain.config import DataConfig, PrefixConfig, TrainConfig
from pretrain.config.plan import Phase, RunPlan
from pretrain.data.batch import Batch
from pretrain.data.manifest import Manifest
from pretrain.data.order import Mix, Offset, Order, Progress
from pretrain.data.packed_order import PackedOrder
from pretrain.data.packing import PackedRows, describe_cuts, packed
from pretrain.data.prefixes import generator_of, with_prefixes
from pretrain.data.reading_on import ReadingOn
from pretrain.data.sequences import Sequences
from pretrain.data.shards import Shard, TokenStream
from pretrain.data.tokenizer import Tokenizer


@dataclass
class PreparedData:
    """The data of a run: its tokenizer, and per source its name, weight, and streams by split.

    A source's name is ``NAME@HASH`` of its folder's content: where the folder is does not matter,
    and what is named twice is one source, with both weights. ``known`` has the names by contents: a
    source that was prepared beside others elsewhere has the name of where it was found first.
    """

    tokenizer: Tokenizer
    sources: list[str]
    weights: list[float]
    train: list[TokenStream]
    valid: list[TokenStream]
    bigram_entropy: float
    known: dict[tuple[str, ...], str] = field(default_factory=dict)

    @property
    def identity(self) -> list[str]:
        """Return what the order of samples depends on besides the seed."""
        return [f"{n} x {w:.6g}" for n, w in zip(self.sources, self.weights, strict=True)]

    def has_the_mix_of(self, other: PreparedData) -> bool:
        """Return whether ``other`` has the same sources in the same shares."""
        return (self.sources, self.weights) == (other.sources, other.weights)

    @property
    def labels(self) -> list[str]:
        """Return a name for every source: its own, with the hash where two have the same."""
        names = [source.rsplit("@", 1)[0] for source in self.sources]
        return [
            name if names.count(name) == 1 else source
            for name, source in zip(names, self.sources, strict=True)
        ]


def open_data(
    config: DataConfig, known: Mapping[tuple[str, ...], str] | None = None
) -> PreparedData:
    """Open everything that the settings name. Raises UserError where it does not fit together.

    ``known``: the names of sources that the run has found before, see :class:`PreparedData`.
    """
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
            data = PreparedData(found, [], [], [], [], 0.0, dict(known or {}))
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
            name = data.known.setdefault(
                manifest.content_of(source.name), f"{source.name}@{manifest.content_sha256[:16]}"
            )
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


class _Sizes(Protocol):
    """How many tokens steps have."""

    def batch_tokens(self, step: int) -> int: ...

    def tokens_before(self, step: int) -> int: ...


class _Part(NamedTuple):
    """Steps with the same data, in samples of one length, and in ``rows`` where those read on."""

    first: int
    last: int | None
    seq_len: int
    window: int
    data: PreparedData
    rows: int | None = None

    def goes_on_in(self, other: _Part) -> bool:
        """Return whether ``other`` reads the same mix in the same pieces."""
        sizes = (self.seq_len, self.window, self.rows)
        same = sizes == (other.seq_len, other.window, other.rows)
        return same and self.data.has_the_mix_of(other.data)


def _part(phase: Phase, data: PreparedData, window: int) -> _Part:
    train = phase.config.train
    rows = train.global_batch_tokens // train.seq_len if train.carry_state else None
    return _Part(phase.first, phase.last, train.seq_len, window, data, rows)


class TrainingBatches:
    """The micro-batches of every step, a function of (seed, step, rank, world size) alone.

    Those of a run without phases, with documents one after another; :meth:`of_run` has those of
    any run.
    """

    def __init__(
        self,
        data: PreparedData,
        config: TrainConfig,
        micro_batch_size: int,
        seed: int,
        prefix: PrefixConfig | None = None,
    ):
        rows = config.global_batch_tokens // config.seq_len if config.carry_state else None
        part = _Part(0, None, config.seq_len, config.seq_len, data, rows)
        self._set_up([part], config, config, seed, DataConfig(prefix=prefix))
        self._micro_batch_sizes: list[tuple[int | None, int]] = [(None, micro_batch_size)]

    @classmethod
    def of_run(
        cls, plan: RunPlan, phases: Sequence[PreparedData], windows: Sequence[int], seed: int
    ) -> TrainingBatches:
        """Return the batches of a run, from the data of each of its phases and its windows."""
        parts: list[_Part] = []
        for phase, data, window in zip(plan.phases, phases, windows, strict=True):
            part = _part(phase, data, window)
            if parts and parts[-1].goes_on_in(part):
                # One mix: its shares stay exact over the border.
                part = part._replace(first=parts.pop().first)
            parts.append(part)
        parts[-1] = parts[-1]._replace(last=None)
        batches = cls.__new__(cls)
        config = plan.phases[0].config
        batches._set_up(parts, plan, config.train, seed, config.data)
        sizes = [(p.last, p.config.parallel.micro_batch_size) for p in plan.phases]
        batches._micro_batch_sizes = [*sizes[:-1], (None, sizes[-1][1])]
        return batches

    def _set_up(
        self,
        parts: Sequence[_Part],
        sizes: _Sizes,
        config: TrainConfig,
        seed: int,
        settings: DataConfig,
    ) -> None:
        self._sizes, self.seed, self._prefix = sizes, seed, settings.prefix
        self._tokenizer = parts[0].data.tokenizer
        self._before: dict[tuple[int, Offset], list[Progress]] = {}
        self.eod_id = self._tokenizer.eod_id
        self.streams: dict[str, TokenStream] = {}
        self.packed: dict[tuple[str, int], PackedRows] = {}
        found = []
        for first, last, length, window, data, _ in parts:
            for name, stream in zip(data.sources, data.train, strict=True):
                stream = self.streams.setdefault(name, stream)
                if settings.packing == "best_fit" and (name, length) not in self.packed:
                    self.packed[name, length] = PackedRows(stream, length, self.eod_id)
            total = sum(Fraction(w) for w in data.weights)
            weights = [Fraction(w) / total for w in data.weights]
            windows = [self._windows(name, length, window) for name in data.sources]
            found.append(Mix(first, last, length, window, data.sources, weights, windows))
        self.order = PackedOrder(found, seed, self.packed) if self.packed else Order(found, seed)
        rows = [part.rows for part in parts if part.rows is not None]
        if rows:
            self.order = ReadingOn(found, seed, rows, config.carry_steps)

    def _windows(self, name: str, seq_len: int, window: int) -> int:
        """Return the number of windows of a source, at least one."""
        if self.packed:
            count = len(self.packed[name, seq_len])
        else:
            count = (len(self.streams[name]) - 1) // window
        if count < 1:
            sample = "sample of train.seq_len" if window == seq_len else "window"
            raise UserError(
                f"{name}: its training split has {len(self.streams[name])} tokens, fewer than one "
                f"{sample} + 1 = {window + 1}"
            )
        return count

    @property
    def names(self) -> list[str]:
        """Return the names of all sources, in the order in which the run comes to them."""
        return list(self.streams)

    @property
    def samples(self) -> list[int]:
        """Return the number of windows of each of :attr:`names`."""
        known: dict[str, int] = {}
        for mix in self.order.mixes:
            known |= dict(zip(mix.names, mix.windows, strict=True))
        return [known[name] for name in self.names]

    def micro_batches(
        self, step: int, rank: int = 0, size: int = 1, *, offset: Offset = 0
    ) -> list[Batch]:
        """Return the micro-batches of one step for data-parallel rank ``rank`` of ``size``.

        ``offset``: data that rollbacks skipped.
        """
        mix = self.mix_at(step)
        sizes = self._micro_batch_sizes
        micro = next(rows for last, rows in sizes if last is None or step < last)
        first = (self._tokens_of(mix, step) + mix.skipped(offset)) // mix.seq_len
        per_step = self._sizes.batch_tokens(step) // mix.seq_len
        batches = []
        for start in range(first + rank * micro, first + per_step, size * micro):
            batches.append(self._batch(mix, range(start, start + micro), offset))
        return batches

    def _batch(self, mix: Mix, indices: range, offset: Offset) -> Batch:
        before = self._read_before(mix, offset)
        rows: list[Any] = []
        for index in indices:
            if isinstance(self.order, PackedOrder):
                rows.append(self.order.read(mix, index, before))
                continue
            source, number, token = self.order.locate(mix, index, before)
            start = number * mix.window + token
            rows.append(self.streams[mix.names[source]].read(start, mix.seq_len + 1))
        if self.packed:
            batch = Batch(*packed(rows))
        else:
            goes_on = None
            if self.order.reads_on:
                goes_on = [self.order.span(mix, i)[1] > 0 for i in indices]
            batch = pack_rows(np.stack(rows), self.eod_id, goes_on)
        if self._prefix is None:
            return batch
        generators = [generator_of(self.seed, mix.first, index) for index in indices]
        return with_prefixes(batch, self._prefix, self._tokenizer, generators)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, window of it) of sample ``index`` of the run's first mix."""
        mix = self.order.mixes[0]
        return self.order.locate(mix, index, self._read_before(mix, 0))[:2]

    def describe_place(self, step: int, row: int, token: int, *, offset: Offset = 0) -> str:
        """Return in words where in the data a token of sequence ``row`` of a step's batch lies."""
        mix = self.mix_at(step)
        first = (self._tokens_of(mix, step) + mix.skipped(offset)) // mix.seq_len
        before = self._read_before(mix, offset)
        source, number, begin = self.order.locate(mix, first + row, before)
        name = mix.names[source]
        if self.packed:
            left = number - len(self.packed[name, mix.seq_len])
            if left >= 0:
                return f"row {left:,} of the packed rows of what was left of {name}"
            return f"row {number:,} of the packed rows of {name}"
        return f"token {number * mix.window + begin + token:,} of {name}"

    def epochs(self, step: int, *, offset: Offset = 0) -> list[float]:
        """Return how often each of :attr:`names` has been seen when ``step`` steps are done."""
        seen = dict.fromkeys(self.names, Fraction(0))
        for mix in self.order.mixes:
            if step < mix.first:
                break
            samples = (self._tokens_of(mix, step) + mix.skipped(offset)) // mix.seq_len
            for name, weight, windows in zip(mix.names, mix.weights, mix.windows, strict=True):
                seen[name] += samples * weight * mix.seq_len / (windows * mix.window)
        return [float(times) for times in seen.values()]

    def describe_packing(self) -> str:
        """Return in words how many documents are cut by ends of sequences, by their length."""
        return describe_cuts(self.order.mixes, self.streams, self.packed)

    def mix_at(self, step: int) -> Mix:
        """Return the mix of a step."""
        return next(mix for mix in self.order.mixes if mix.has(step))

    def _tokens_of(self, mix: Mix, step: int) -> int:
        """Return the tokens of the steps of a mix before ``step``."""
        end = step if mix.last is None else min(step, mix.last)
        return self._sizes.tokens_before(end) - self._sizes.tokens_before(mix.first)

    def _read_before(self, mix: Mix, offset: Offset) -> list[Progress]:
        """Return what was read of each source of a mix before it."""
        key = (mix.first, offset)
        if key not in self._before:
            tokens = [
                0 if m.last is None else self._tokens_of(m, m.last) + m.skipped(offset)
                for m in self.order.mixes
            ]
            self._before[key] = self.order.before(mix, tokens)
        return self._before[key]


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
