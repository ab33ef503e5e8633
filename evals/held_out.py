"""Held-out text of prepared data, by source: its documents, windows over them, and their scores.

Every document is read alone. It begins with the end-of-document token, as in training (the BOS
rule; an imported model has a BOS or EOS of its own), and its own end-of-document token is the last
target. Windows of ``window`` tokens advance by ``stride``; each target is scored once, with at
least ``window - stride`` tokens of context where the document has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.common.errors import UserError
from pretrain.config import DataConfig
from pretrain.data.batches import PreparedData, open_data
from pretrain.data.shards import TokenStream
from pretrain.inference.load import LoadedModel
from pretrain.model.layout import check_causal

TRAINING_WINDOWS = "of validation in training"  # what results call these windows


@dataclass
class Window:
    """A window of ``[n]`` input and target ids, of which the last ``scored`` targets count."""

    inputs: np.ndarray
    targets: np.ndarray
    scored: int


class Documents:
    """The documents of a validation split, and the windows over them, each by its number."""

    def __init__(self, stream: TokenStream, opening_id: int, window: int, stride: int):
        self._stream, self._opening_id = stream, opening_id
        self._window, self._stride = window, stride
        self.lengths = stream.document_lengths()
        self._starts = np.cumsum(self.lengths) - self.lengths
        beyond_first = np.maximum(self.lengths - window, 0)
        self._windows_up_to = np.cumsum(1 + -(-beyond_first // stride))

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all documents, which is that of targets."""
        return int(self.lengths.sum())

    @property
    def num_windows(self) -> int:
        """Return the number of windows over all documents."""
        return int(self._windows_up_to[-1]) if len(self._windows_up_to) else 0

    def document(self, number: int) -> np.ndarray:
        """Return document ``number``, ``[tokens]`` int64 ids that end with the end-of-document."""
        return self._stream.read(int(self._starts[number]), int(self.lengths[number]))

    def document_of(self, window: int) -> int:
        """Return the number of the document that window number ``window`` is over."""
        return int(np.searchsorted(self._windows_up_to, window, side="right"))

    def window(self, number: int) -> Window:
        """Return window ``number`` of all documents' windows, in their order."""
        document = self.document_of(number)
        within = number - (int(self._windows_up_to[document - 1]) if document else 0)
        length = int(self.lengths[document])
        done = 0 if within == 0 else self._window + (within - 1) * self._stride
        end = min(length, self._window if within == 0 else done + self._stride)
        start = max(0, end - self._window)
        first = int(self._starts[document])
        targets = self._stream.read(first + start, end - start)
        before = self._opening_id if start == 0 else int(self._stream.read(first + start - 1, 1)[0])
        return Window(np.concatenate([[before], targets[:-1]]), targets, end - done)


def data_directories(loaded: LoadedModel, data: str | None) -> list[str]:
    """Return ``data``, or the prepared directories that a run was trained on.

    Raises UserError where there are none, as for an imported model.
    """
    found = [data] if data else [part.path for part in loaded.run.data.directories]
    if not found:
        raise UserError(
            f"{loaded.checkpoint} has no training data: give --data, a directory prepared with its "
            "tokenizer"
        )
    return list(dict.fromkeys(found))


def open_held_out(
    loaded: LoadedModel, data: str | None, *, training_windows: bool = False
) -> PreparedData:
    """Open ``data``, or the data that a run was trained on, for its validation splits.

    ``training_windows``: documents in them have prefixes, if they had in training.

    Raises UserError where there is none, it was made with another tokenizer, or the model would see
    the tokens that it is to predict.
    """
    prefix = loaded.run.data.prefix
    if prefix is not None and not training_windows:
        raise UserError(
            f"{loaded.checkpoint} was trained with data.prefix and would see tokens that it is to "
            "predict; expected --training-windows, where a document's prefix is not predicted"
        )
    check_causal(loaded.model.model_config, str(loaded.checkpoint), prefix)
    directory = data_directories(loaded, data)[0]
    found = open_data(DataConfig(path=data) if data else loaded.run.data)
    if found.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise UserError(
            f"{directory} was made with another tokenizer ({found.tokenizer.sha256[:12]}...) than "
            f"the model's ({loaded.tokenizer.sha256[:12]}...); prepare it with "
            f"tokenizer: {{path: {loaded.checkpoint}}}"
        )
    return found


@dataclass
class Scores:
    """The scores of one source.

    Attributes:
        source: Its label.
        weight: Its share of the training samples.
        parts: ``[n, 3]``: nats, tokens and bytes of each window or document that was scored.
        available: The number of those that the source has.
        documents: The number of documents, or pieces of documents, that they are of.
    """

    source: str
    weight: float
    parts: np.ndarray
    available: int
    documents: int

    @property
    def tokens(self) -> int:
        """Return the number of targets that were scored."""
        return int(self.parts[:, 1].sum())

    @property
    def bytes(self) -> int:
        """Return the bytes of text that they stand for."""
        return int(self.parts[:, 2].sum())


def nats_per_token(found: Sequence[Scores]) -> tuple[float, float | None]:
    """Return the mean over all tokens of the sources, and its standard error; see :func:`ratio`."""
    return ratio([(s.parts[:, 0], s.parts[:, 1], s.available) for s in found])


def bits_per_byte(found: Sequence[Scores]) -> tuple[float, float | None]:
    """Return the bits per byte of all text of the sources, and their standard error."""
    return ratio([(s.parts[:, 0] / math.log(2), s.parts[:, 2], s.available) for s in found])


def ratio(
    strata: Sequence[tuple[np.ndarray, np.ndarray, int]],
) -> tuple[float, float | None]:
    """Estimate sum of x / sum of y over populations of which simple random samples are known.

    Each stratum is (x ``[n]``, y ``[n]``, size of its population). Returns the combined ratio
    estimate and its standard error (Cochran, Sampling Techniques, 3rd edition, section 6.11); None
    for the error where every population is known in full.
    """
    above = sum(size / len(x) * float(x.sum()) for x, _, size in strata)
    below = sum(size / len(x) * float(y.sum()) for x, y, size in strata)
    variance, sampled = 0.0, False
    for x, y, size in strata:
        n = len(x)
        if n < size:
            residual = x - above / below * y
            sampled = True
            variance += size**2 * (1 - n / size) / n * float(residual.var(ddof=1))
    return above / below, math.sqrt(variance) / below if sampled else None


def sample(sizes: Sequence[tuple[int, int]], max_tokens: int | None, seed: int) -> list[np.ndarray]:
    """Return the numbers of the windows to score of every source, in order.

    ``sizes`` are (windows, tokens) of the sources. At most about ``max_tokens`` tokens are drawn at
    random, and each source has the share of the windows that it has of all; two at least, which a
    standard error needs. Without ``max_tokens``, or where there are no more, it is all of them.
    """
    tokens = sum(t for _, t in sizes)
    if max_tokens is None or max_tokens >= tokens:
        return [np.arange(windows) for windows, _ in sizes]
    chosen = []
    for number, (windows, _) in enumerate(sizes):
        count = min(max(round(max_tokens * windows / tokens), 2), windows)
        generator = np.random.default_rng([seed, number])
        chosen.append(np.sort(generator.choice(windows, count, replace=False)))
    return chosen


def running_text(loaded: LoadedModel, data: str | None, wanted: int) -> np.ndarray:
    """Return so many tokens of held-out documents of all sources, drawn at random without repeats.

    Always the same ones; fewer where there are no more.
    """
    held_out = open_held_out(loaded, data)
    opening_id = loaded.opening_id
    sources = [Documents(stream, opening_id, 1, 1) for stream in held_out.valid]
    every = [(source, i) for source in sources for i in range(len(source.lengths))]
    parts, have = [np.array([opening_id])], 1
    for number in np.random.default_rng(0).permutation(len(every)):
        source, document = every[number]
        parts.append(source.document(document))
        have += len(parts[-1])
        if have >= wanted:
            break
    return np.concatenate(parts)[:wanted]
