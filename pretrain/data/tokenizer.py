"""Text to token ids and back, the same interface over SentencePiece and Hugging Face models.

Neither torch nor megatron-core is imported here: the worker processes load this module.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.common.errors import UserError

FILE_NAMES = ("tokenizer.model", "tokenizer.json")

# Names under which models keep the token that ends a document, most specific first.
_END_OF_DOCUMENT = (
    "<eod>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "<eos>",
    "</s>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
)

_SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces

# Cutting after a newline leaves the ids as they are when no piece contains a newline; short
# chunks are also faster (SentencePiece's work grows a little faster than the text's length).
_CHUNK = 8_192
_LONGEST_LINE = 1_000_000
_PROBE = (
    '  a  b\n\n\tif x:\r\n        y = 1  \n\x00e\u0301 ﬁ \u2581🙂 <0x41> <s> "\u3000\u200b" \ufb01 '
)


class Tokenizer(ABC):
    """A loaded tokenizer; make one with :meth:`load`."""

    kind: str
    path: Path
    vocab_size: int
    eod_id: int  # ends each document, and so opens the next

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a SentencePiece ``.model``, a Hugging Face ``tokenizer.json``, or a folder with one.

        Raises :class:`UserError` when the file is missing or is no tokenizer.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in FILE_NAMES if (path / name).is_file()]
            if not found:
                raise UserError(f"{path} holds neither {FILE_NAMES[0]} nor {FILE_NAMES[1]}")
            path = found[0]
        if not path.is_file():
            raise UserError(f"no tokenizer file at {path}")
        if path.suffix == ".json":
            return HuggingFaceTokenizer(path)
        if path.suffix == ".model":
            return SentencePieceTokenizer(path)
        raise UserError(f"{path}: expected a SentencePiece .model or a Hugging Face .json file")

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``. No text produces the end-of-document or a special id."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Return the text of ids among which no end-of-document id is left."""

    @abstractmethod
    def name_of(self, index: int) -> str:
        """Return the token ``index`` as the tokenizer's file writes it."""

    @abstractmethod
    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        """Return ``[vocab_size]``: the UTF-8 bytes that each id stands for, 0 for special ids.

        The sum over a text's ids is the text's length in bytes. Raises :class:`UserError` for
        tokenizers that change the text, where no such number exists.
        """

    def decode(self, ids: Iterable[int] | npt.NDArray[Any]) -> str:
        """Return the text of ``ids``, without end-of-document ids; the inverse of ``encode``."""
        plain = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return self._decode([int(i) for i in plain if i != self.eod_id])

    def encode_to_array(self, text: str) -> npt.NDArray[Any]:
        """Return :meth:`encode` of ``text`` as a ``[tokens]`` array of :attr:`dtype`."""
        return np.array(self.encode(text), dtype=self.dtype)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return uint16 where the vocabulary allows, else int32, as megatron-core does."""
        return np.dtype(np.uint16 if self.vocab_size < 65_500 else np.int32)

    @cached_property
    def sha256(self) -> str:
        """Return the hash of the tokenizer's file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @cached_property
    def lossless(self) -> bool:
        """Return whether a text made of the usual stumbling blocks comes back unchanged."""
        return self.decode(self.encode(_PROBE)) == _PROBE


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; those trained here give every text back byte for byte."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        content = path.read_bytes()
        try:
            if not content:  # the library would take it for a model without pieces
                raise RuntimeError
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise UserError(f"{path}: not a SentencePiece model") from None
        self.vocab_size = int(self._model.get_piece_size())
        self.eod_id = int(self._model.eos_id())
        if self.eod_id < 0:
            raise UserError(
                f"{path}: this SentencePiece model has no end-of-sentence piece, "
                "which is needed to end documents"
            )
        self._pieces: list[str] = [self._model.id_to_piece(i) for i in range(self.vocab_size)]
        # Only a model that neither adds nor drops whitespace can be fed in small chunks.
        newline_alone = not any("\n" in piece and piece != "\n" for piece in self._pieces)
        exact = self._model.decode(self._model.encode(" a\n b")) == " a\n b"
        self._chunk = _CHUNK if newline_alone and exact else _LONGEST_LINE
        bytes_of_space = [self._model.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]
        has_bytes = all(self._model.is_byte(i) for i in bytes_of_space)
        self._space_ids = bytes_of_space if has_bytes and exact else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``."""
        # SentencePiece would turn a literal U+2581 into a space: spell it in bytes instead.
        if self._space_ids is None or _SPACE not in text:
            return self._encode_plain(text)
        ids: list[int] = []
        for index, part in enumerate(text.split(_SPACE)):
            if index:
                ids.extend(self._space_ids)
            ids.extend(self._encode_plain(part))
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if len(text) <= self._chunk:
            return self._model.encode(text)
        ids: list[int] = []
        for chunk in chunks(text, self._chunk):
            ids.extend(self._model.encode(chunk))
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def name_of(self, index: int) -> str:
        """Return the piece ``index``."""
        return self._pieces[index]

    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        """Return the bytes of each piece, 1 for byte pieces. Raises UserError for lossy models."""
        if not self.lossless:
            raise UserError(f"{self.path}: {_LOSSY}")
        model = self._model
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for index, piece in enumerate(self._pieces):
            if model.is_byte(index):
                sizes[index] = 1
            elif not (model.is_control(index) or model.is_unknown(index)):
                sizes[index] = len(piece.replace(_SPACE, " ").encode())
        return sizes


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the Hugging Face ``tokenizers`` library."""

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        # Each worker process encodes alone; threads below it would only compete.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"{path} needs the tokenizers package: pip install tokenizers"
            ) from None

        self.path = path
        try:
            content = path.read_bytes().decode()
            self._spec: dict[str, Any] = json.loads(content)
            self._model = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{path}: not a Hugging Face tokenizer.json ({error})") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # text that looks like a special token is text
        self._vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        # Some vocabularies have holes: the largest id, not the count, bounds the ids.
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        ends = [self._vocabulary[t] for t in _END_OF_DOCUMENT if t in self._vocabulary]
        if not ends:
            raise UserError(
                f"{path}: no token that ends a document, looked for {', '.join(_END_OF_DOCUMENT)}"
            )
        self.eod_id = ends[0]

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``."""
        if len(text) <= _LONGEST_LINE:
            return self._model.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for chunk in chunks(text, _LONGEST_LINE):
            ids.extend(self._model.encode(chunk, add_special_tokens=False).ids)
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def name_of(self, index: int) -> str:
        """Return the token ``index`` as the vocabulary writes it."""
        return str(self._model.id_to_token(index))

    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        """Return the bytes of each token. Raises UserError unless it is a byte-level BPE."""
        if not (_byte_level(self._spec) and self.lossless):
            raise UserError(f"{self.path}: {_LOSSY}")
        alphabet = _byte_alphabet()
        added = {token["id"]: token for token in self._spec.get("added_tokens", [])}
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, index in self._vocabulary.items():
            if index in added:
                sizes[index] = 0 if added[index]["special"] else len(piece.encode())
            else:
                sizes[index] = sum(1 if c in alphabet else len(c.encode()) for c in piece)
        return sizes


_LOSSY = (
    "this tokenizer does not restore text byte for byte, "
    "so its tokens have no exact number of bytes"
)


def chunks(text: str, size: int) -> Iterator[str]:
    """Cut ``text`` after newlines into chunks of at most ``size`` characters.

    A line longer than that stays whole up to a million characters.
    """
    start = 0
    while len(text) - start > size:
        end = text.rfind("\n", start, start + size) + 1
        if end == 0:
            limit = start + max(size, _LONGEST_LINE)
            end = text.find("\n", start + size, limit) + 1 or min(limit, len(text))
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _byte_level(spec: dict[str, Any]) -> bool:
    """Return whether every token of a tokenizer.json is a string over the alphabet of 256 bytes."""

    def parts(section: str, key: str) -> list[dict[str, Any]]:
        part = spec.get(section)
        return [] if part is None else part.get(key, [part])

    adds_space = any(p.get("add_prefix_space") for p in parts("pre_tokenizer", "pretokenizers"))
    return (
        not parts("normalizer", "normalizers")
        and not adds_space
        and [p["type"] for p in parts("decoder", "decoders")] == ["ByteLevel"]
    )


def _byte_alphabet() -> set[str]:
    """Return the 256 characters by which byte-level BPE (GPT-2) writes bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = 256 - len(printable)
    return {chr(b) for b in printable} | {chr(256 + i) for i in range(others)}
