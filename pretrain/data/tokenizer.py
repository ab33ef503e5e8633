"""Text to token ids and back, the same interface over SentencePiece and Hugging Face models.

Neither torch nor megatron-core is imported here: the worker processes load this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.common.errors import UserError
from pretrain.data.tokenizer_parts import byte_alphabet, byte_fallback, byte_level

FILE_NAMES = ("tokenizer.model", "tokenizer.json")

# Names under which models keep the token that ends a document, most specific first.
_END_OF_DOCUMENT = (
    "<eod>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's, with full-width bars
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
_LOSSY = (
    "this tokenizer does not restore text byte for byte, "
    "so its tokens have no exact number of bytes"
)
_PROBE = (  # the usual stumbling blocks
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
            # A folder with both, as some models have, is read as transformers reads it.
            found = [path / name for name in FILE_NAMES if (path / name).is_file()]
            if not found:
                raise UserError(f"{path} holds neither {FILE_NAMES[0]} nor {FILE_NAMES[1]}")
            path = found[-1]
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
        self._chunk = _CHUNK if newline_alone and exact else _LONGEST_LINE
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
        codes = np.r_[0:0xD800, 0xE000 : sys.maxunicode + 1]  # every character but surrogates
        every = codes.astype("<u4").tobytes().decode("utf-32-le")
        normalized = self._model.normalize(every).replace(_SPACE, " ")
        return (
            self._has_bytes and normalized == every.replace(_SPACE, " ") and self._restores(_PROBE)
        )

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
        self._added: dict[int, dict[str, Any]] = {
            token["id"]: token for token in self._spec.get("added_tokens", [])
        }
        special = {i for i, token in self._added.items() if token["special"]}
        # What has no piece of its own becomes the unknown token, which marks nothing.
        self._reserved = frozenset({self.eod_id, *(special - {self._unknown_id()})})
        for index in sorted(self._reserved):
            self.encode(self.name_of(index))  # raises where its name cannot be spelt otherwise

    def _unknown_id(self) -> int | None:
        model = self._spec["model"]
        return model.get("unk_id", self._vocabulary.get(model.get("unk_token") or ""))

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; what would be read as a reserved token is cut inside.

        Raises :class:`UserError` where that is a single character.
        """
        if len(text) > _LONGEST_LINE:
            return [i for chunk in chunks(text, _LONGEST_LINE) for i in self.encode(chunk)]
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        if self._reserved.isdisjoint(ids):
            return ids
        names = {self.name_of(i) for i in self._reserved.intersection(ids)}
        if len(text) == 1:
            raise UserError(
                f"{self.path}: the text {text!r} is read as the special token {names.pop()!r}, "
                "expected one that text cannot make: with a longer name, or, if it ends no "
                "document, with special: false in added_tokens"
            )
        # After the first character of its name; in the middle where only a normalizer makes it.
        inside = (f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names if len(n) > 1)
        cuts = [found.start() for found in re.finditer("|".join(inside) or "(?!)", text)]
        ends = [0, *(cuts or [len(text) // 2]), len(text)]
        return [i for a, b in pairwise(ends) for i in self.encode(text[a:b])]

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    @cached_property
    def lossless(self) -> bool:
        """Return whether every text comes back unchanged, by the file's parts and a probe."""
        if byte_level(self._spec):
            return not self._missing_bytes() and self._restores(self._probe())
        pieces = {f"<0x{b:02X}>" for b in range(256)}
        spells_all = byte_fallback(self._spec) and pieces <= self._vocabulary.keys()
        return spells_all and self._restores(self._probe())

    def _probe(self) -> str:
        """Return the stumbling blocks, and every added token between spaces and alone."""
        names = [token["content"] for token in self._added.values()]
        return _PROBE + "".join(f"{name}  {name} a{name}b\n{name}\n" for name in names)

    def _missing_bytes(self) -> set[int]:
        """Return the bytes of UTF-8 that a byte-level vocabulary has no piece for."""
        written = {*range(0xC0), *range(0xC2, 0xF5)}
        return {byte for c, byte in byte_alphabet().items() if c not in self._vocabulary} & written

    def name_of(self, index: int) -> str:
        """Return the token ``index`` as the vocabulary writes it."""
        return str(self._model.id_to_token(index))

    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        """Return the bytes of each token. Raises UserError unless it is a byte-level BPE.

        A byte that has no piece is dropped in encoding, and counts nowhere.
        """
        missing = self._missing_bytes()
        kept = "".join(c for c in self._probe() if missing.isdisjoint(c.encode()))
        if not (byte_level(self._spec) and self._restores(kept)):
            raise UserError(f"{self.path}: {_LOSSY}")
        alphabet, no_text = byte_alphabet(), self._reserved | {self._unknown_id()}
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, index in self._vocabulary.items():
            if index in no_text:
                continue
            if index in self._added:
                sizes[index] = len(piece.encode())
            else:
                sizes[index] = sum(1 if c in alphabet else len(c.encode()) for c in piece)
        return sizes


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
