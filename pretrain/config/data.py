"""The data of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pretrain.common.config_loader import Config, setting


@dataclass
class DataSource(Config):
    """One prepared directory of a blend."""

    path: str
    """The directory, as ``python -m data_prep`` wrote it."""
    weight: float = setting(1.0, above=0)
    """Its share of the samples, relative to the other weights."""
    weights: dict[str, float] = setting(factory=dict, minimum=0)
    """Weights of its sources by name, in place of those in its manifest; 0 leaves a source out."""


@dataclass
class PrefixConfig(Config):
    """The prefix of every document in a batch, which layers such as ``jrt`` see as a whole.

    The tokens after it are predicted one by one; within it hidden ones are (arXiv 2407.05483).
    """

    tokens: int = setting(1024, minimum=1)
    """The longest prefix; no longer than the ``prefix_length`` of the layers."""
    fraction: float = setting(0.5, above=0, maximum=1)
    """Share of a document, or of the piece of it in a sequence, that is prefix, rounded down, up to
    ``tokens``."""
    length: Literal["fixed", "drawn"] = setting("fixed")
    """Whether prefixes are as long as that, or each of a length from 0 to that, all equally likely;
    validation always has the longest."""
    mask_fraction: float = setting(0.15, minimum=0, maximum=1)
    """Share of a prefix's tokens that training hides behind the mask token, to be predicted."""
    mask_id: int | None = setting(None, minimum=0)
    """Id of the mask token; null: the first one after the tokenizer's, for which the vocabulary
    gets a row."""
    mask_weight: float = setting(0.25, minimum=0)
    """Weight of the mean loss of hidden tokens beside the mean loss of the next token."""

    @property
    def hides(self) -> bool:
        """Return whether training hides tokens."""
        return self.mask_fraction > 0 and self.mask_weight > 0

    def ids(self, vocab_size: int) -> int:
        """Return how many ids inputs have with a tokenizer of ``vocab_size``."""
        return vocab_size + 1 if self.hides and self.mask_id is None else vocab_size

    def mask_token(self, vocab_size: int) -> int:
        """Return the id of the mask token with a tokenizer of ``vocab_size``."""
        return vocab_size if self.mask_id is None else self.mask_id


@dataclass
class DataConfig(Config):
    """The training data: exactly one of ``path`` and ``blend`` is set."""

    path: str | None = None
    """A directory that ``python -m data_prep`` wrote; its sources are blended by the weights in its
    manifest."""
    weights: dict[str, float] = setting(factory=dict, minimum=0)
    """Weights of the sources of ``path`` by name, in place of those in its manifest; 0 leaves a
    source out."""
    blend: list[DataSource] = field(default_factory=list)
    """Several such directories, with weights of their own; one that is named twice counts once,
    with both weights."""
    packing: Literal["concatenate", "best_fit"] = setting("concatenate")
    """How documents fill sequences: ``concatenate`` cuts the stream of all of them every
    ``train.seq_len`` tokens; ``best_fit`` puts each into the fullest sequence that has room for it
    and cuts only those that are longer (arXiv 2404.10830), so that ends of sequences may be
    empty."""
    window: int | None = setting(None, minimum=2)
    """Tokens of the windows of text whose order is drawn, a multiple of every ``seq_len``; null:
    the longest ``seq_len`` of all phases. Shorter sequences are the pieces of a window, in their
    order. Not with ``best_fit``, which has no windows."""
    verify: Literal["size", "sha256"] = setting("size")
    """What is checked of every file before training: its size, or its hash, for which all of the
    data is read."""
    prefix: PrefixConfig | None = None
    """Prefixes that layers see as a whole, for models with such a layer; null: none."""

    def ids(self, vocab_size: int) -> int:
        """Return how many ids inputs have with a tokenizer of ``vocab_size``."""
        return vocab_size if self.prefix is None else self.prefix.ids(vocab_size)

    @property
    def directories(self) -> list[DataSource]:
        """Return every directory with its weights."""
        if self.path is not None:
            return [DataSource(self.path, 1.0, self.weights)]
        return self.blend
