"""Train a SentencePiece model that restores every text byte for byte."""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Iterable, Iterator

from data_prep.config import DataPrepConfig, TokenizerConfig
from data_prep.documents import Source
from data_prep.sources import open_source
from pretrain.common.errors import UserError

_LINE = 2_000  # characters: at most 8,000 bytes, below max_sentence_length, so nothing is skipped


def is_validation(content: bytes, fraction: float) -> bool:
    """Return whether a document belongs to the validation split, by its content alone."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) < fraction * 2**64


def train_tokenizer(config: DataPrepConfig) -> bytes:
    """Return the bytes of a model trained on a bounded sample; equal samples give equal bytes."""
    return train_sentencepiece(sample(config), config.tokenizer)


def sample(config: DataPrepConfig) -> Iterator[str]:
    """Yield text of training documents, at most ``tokenizer.sample_bytes``, by sources' weights.

    Within a source the files come in a shuffled order and divide the remaining budget evenly, so
    that a large first file does not crowd out the others; each contributes its beginning.
    """
    total = sum(source.weight for source in config.sources)
    for source_config in config.sources:
        budget = int(config.tokenizer.sample_bytes * source_config.weight / total)
        for content in _sample_source(open_source(source_config), budget, config):
            yield content.decode("utf-8", "ignore")


def _sample_source(source: Source, budget: int, config: DataPrepConfig) -> Iterator[bytes]:
    files = list(range(source.file_count))
    random.Random(config.seed).shuffle(files)
    for index, file in enumerate(files):
        share = budget // (len(files) - index)
        for document in source.read(file):
            if share <= 0:
                break
            if not is_validation(document.content, config.validation_fraction):
                taken = document.content[:share]
                yield taken
                share -= len(taken)
                budget -= len(taken)


def train_sentencepiece(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Train on ``texts`` and return the bytes of the model file.

    Raises :class:`UserError` when the text cannot fill the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    failures: list[UserError] = []  # of reading; the library would turn them into a RuntimeError

    def lines() -> Iterator[str]:
        try:
            yield from _lines(texts)
        except UserError as error:
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            # Nothing may be normalized away, and what has no piece is spelled in bytes.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            # Line ends and indentation as pieces of their own: a sixth fewer tokens on code.
            user_defined_symbols=["\n", "\t"],
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            unk_id=0,
            eos_id=1,
            eos_piece="<eod>",
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * _LINE + 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise (failures or [UserError(_explain(str(error), config))])[0] from None
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LINE):
                yield line[start : start + _LINE]


def _explain(message: str, config: TokenizerConfig) -> str:
    size = f"tokenizer.vocab_size is {config.vocab_size}"
    if match := re.search(r"set it to a value <= (\d+)", message):
        return f"{size}, but the text sample supports at most {match[1]}"
    if match := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"{size}, but the sample's characters need at least {match[1]}"
    if "sentences_.empty()" in message:
        return (
            "no text to train a tokenizer on: every document fell into the validation split, "
            "add documents or lower validation_fraction"
        )
    return f"SentencePiece cannot train on this sample: {message}"
