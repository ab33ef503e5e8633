"""A ``tokenizer.json`` of the Hugging Face ``tokenizers`` library behind our interface."""

from __future__ import annotations

import json
import os
import re
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.common.errors import UserError
from pretrain.data.tokenizer import LONGEST_LINE, LOSSY, PROBE, Tokenizer, chunks

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
        if len(text) > LONGEST_LINE:
            return [i for chunk in chunks(text, LONGEST_LINE) for i in self.encode(chunk)]
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
        if _byte_level(self._spec):
            return not self._missing_bytes() and self._restores(self._probe())
        pieces = {f"<0x{b:02X}>" for b in range(256)}
        spells_all = _byte_fallback(self._spec) and pieces <= self._vocabulary.keys()
        return spells_all and self._restores(self._probe())

    def _probe(self) -> str:
        """Return the stumbling blocks, and every added token between spaces and alone."""
        names = [token["content"] for token in self._added.values()]
        return PROBE + "".join(f"{name}  {name} a{name}b\n{name}\n" for name in names)

    def _missing_bytes(self) -> set[int]:
        """Return the bytes of UTF-8 that a byte-level vocabulary has no piece for."""
        written = {*range(0xC0), *range(0xC2, 0xF5)}
        return {byte for c, byte in _byte_alphabet().items() if c not in self._vocabulary} & written

    def name_of(self, index: int) -> str:
        """Return the token ``index`` as the vocabulary writes it."""
        return str(self._model.id_to_token(index))

    def bytes_per_token(self) -> npt.NDArray[np.int64]:
        """Return the bytes of each token. Raises UserError unless it is a byte-level BPE.

        A byte that has no piece is dropped in encoding, and counts nowhere.
        """
        missing = self._missing_bytes()
        kept = "".join(c for c in self._probe() if missing.isdisjoint(c.encode()))
        if not (_byte_level(self._spec) and self._restores(kept)):
            raise UserError(f"{self.path}: {LOSSY}")
        alphabet, no_text = _byte_alphabet(), self._reserved | {self._unknown_id()}
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, index in self._vocabulary.items():
            if index in no_text:
                continue
            if index in self._added:
                sizes[index] = len(piece.encode())
            else:
                sizes[index] = sum(1 if c in alphabet else len(c.encode()) for c in piece)
        return sizes


# Parts of a tokenizer.json that divide a text and drop nothing of it.
_DIVIDING = {"ByteLevel", "Digits", "FixedLength", "Punctuation", "Split", "UnicodeScripts"}


def _byte_level(spec: dict[str, Any]) -> bool:
    """Return whether every token of a tokenizer.json is a string over the alphabet of 256 bytes."""
    kinds = {part["type"] for part in _parts(spec, "pre_tokenizer", "pretokenizers")}
    return _only_divides(spec) and "ByteLevel" in kinds and _decoders(spec) == ["ByteLevel"]


def _byte_fallback(spec: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json spells what has no piece in bytes, and changes nothing."""
    decoders = _decoders(spec)
    fallback = bool(spec["model"].get("byte_fallback"))
    return _only_divides(spec) and fallback and decoders == ["ByteFallback", "Fuse"]


def _only_divides(spec: dict[str, Any]) -> bool:
    return not _parts(spec, "normalizer", "normalizers") and all(
        part["type"] in _DIVIDING
        and not part.get("add_prefix_space")
        and part.get("behavior") != "Removed"
        for part in _parts(spec, "pre_tokenizer", "pretokenizers")
    )


def _decoders(spec: dict[str, Any]) -> list[str]:
    return [part["type"] for part in _parts(spec, "decoder", "decoders")]


def _parts(spec: dict[str, Any], section: str, key: str) -> list[dict[str, Any]]:
    part = spec.get(section)
    return [] if part is None else part.get(key, [part])


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each of the 256 characters of byte-level BPE (GPT-2) stands for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
