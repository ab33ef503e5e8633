"""A SentencePiece model for transformers, text in and out byte for byte; needs sentencepiece."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

_SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces


class SentencePieceText(PreTrainedTokenizer):
    """A tokenizer like the one in training: nothing is added to a text or taken from it."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **rest: Any) -> None:
        self.vocab_file = vocab_file
        self.model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        bytes_of_space = [self.model.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]
        self._space = bytes_of_space if all(map(self.model.is_byte, bytes_of_space)) else None
        super().__init__(**rest)

    @property
    def vocab_size(self) -> int:
        """Return the number of pieces."""
        return int(self.model.get_piece_size())

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all pieces and added tokens."""
        known = {self.model.id_to_piece(i): i for i in range(self.vocab_size)}
        return {**known, **self.added_tokens_encoder}

    def tokenize(self, text: str, **_: Any) -> list[str]:
        """Return the pieces of ``text``."""
        ids: list[int] = []
        # SentencePiece would turn a literal U+2581 into a space: spell it in bytes instead.
        for index, part in enumerate(text.split(_SPACE) if self._space else [text]):
            ids += (self._space or []) if index else []
            ids += self.model.encode(part)
        return [self.model.id_to_piece(i) for i in ids]

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return self.tokenize(text)

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.model.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.model.id_to_piece(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of ``tokens``."""
        return str(self.model.decode([self.model.piece_to_id(t) for t in tokens]))

    def build_inputs_with_special_tokens(self, ids: list[int], pair: Any = None) -> list[int]:
        """Return the ids without any special token."""
        return ids if pair is None else ids + pair

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> Any:
        """Copy the model's file into ``save_directory``; return its path in a tuple."""
        target = Path(save_directory) / "tokenizer.model"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
