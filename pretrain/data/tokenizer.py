"""Text to token ids and back, the same interface over SentencePiece and Hugging Face models.

Neither torch nor megatron-core is imported here: the worker processes load this module.
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.common.errors import UserError

FILE_NAMES = ("tokenizer.model", "tokenizer.json")

_SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces

# Cutting after a newline leaves the ids as they are when no piece contains a newline; short
# chunks are also faster (SentencePiece's work grows a little faster than the text's length).
_CHUNK = 8_192
LONGEST_LINE = 1_000_000
LOSSY = (
    "this tokenizer does not restore text byte for byte, "
    "so its tokens have no exact number of bytes"
)
PROBE = (  # the usual stumbling blocks
    '  a  b\n\n\tif x:\r\n        y = 1  \n\x00e\u0301 ﬁ \u2581🙂 <0x41> <s> "\u3000\u200b" \ufb01 '
    + "".join(map(chr, range(256)))
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
            from pretrain.data.tokenizer_json import HuggingFaceTokenizer

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

    @property
    @abstractmethod
    def lossless(self) -> bool:
        """Return whether every text comes back unchanged: no part changes or drops anything."""

    def _restores(self, text: str) -> bool:
        return self.decode(self.encode(text)) == text


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
        self._chunk = _CHUNK if newline_alone and exact else LONGEST_LINE
        byte_ids = [self._model.piece_to_id(f"<0x{b:02X}>") for b in range(256)]
        self._has_bytes = all(self._model.is_byte(i) for i in byte_ids)
        bytes_of_space = [byte_ids[b] for b in _SPACE.encode()]
        self._space_ids = bytes_of_space if self._has_bytes and exact else None
        # The library promises that no text makes these.
        controls = {i for i in range(self.vocab_size) if self._model.is_control(i)}
        for name in (self._pieces[i] for i in controls):
            if not controls.isdisjoint(self.encode(name)):
                raise UserError(
                    f"{path}: the text {name!r} is read as a control piece, which would end or "
                    "mark documents; expected a model that spells it in other pieces"
                )

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

    @cached_property
    def lossless(self) -> bool:
        """Return whether every text comes back unchanged, by the model's parts and a probe."""
        every = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
        normalized = self._model.normalize(every).replace(_SPACE, " ")
        return (
            self._has_bytes and normalized == every.replace(_SPACE, " ") and self._restores(PROBE)
        )

    def name_of(self, index: int) -> str:
        """Return the piece ``index``."""
        return self._pieces[index]

    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        """Return the bytes of each piece, 1 for byte pieces. Raises UserError for lossy models."""
        if not self.lossless:
            raise UserError(f"{self.path}: {LOSSY}")
        model = self._model
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for index, piece in enumerate(self._pieces):
            if model.is_byte(index):
                sizes[index] = 1
            elif not (model.is_control(index) or model.is_unknown(index)):
                sizes[index] = len(piece.replace(_SPACE, " ").encode())
        return sizes


def chunks(text: str, size: int) -> Iterator[str]:
    """Cut ``text`` after newlines into chunks of at most ``size`` characters.

    A line longer than that stays whole up to a million characters.
    """
    start = 0
    while len(text) - start > size:
        end = text.rfind("\n", start, start + size) + 1
        if end == 0:
            limit = start + max(size, LONGEST_LINE)
            end = text.find("\n", start + size, limit) + 1 or min(limit, len(text))
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
