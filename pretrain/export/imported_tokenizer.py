"""The tokenizer of a Hugging Face model that is imported: its file as it is, and its settings."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes
from pretrain.data.tokenizer import FILE_NAMES, Tokenizer
from pretrain.export.standalone_model import TOKENIZER_CLASS
from pretrain.inference.hugging_face import HuggingFaceText

_SENTENCEPIECE, _JSON = FILE_NAMES
_COMPARED = (
    "Two texts,  with some spaces:\n\tif x_1 >= 2.5:\r\n\u00c4rger, \u6f22\u5b57, \U0001f642 don't"
)


@dataclass
class SourceTokenizer:
    """A tokenizer's file, by name and content, and how transformers reads texts with it.

    ``settings`` is None for our own exports, whose texts begin and end as in training.
    """

    name: str
    content: bytes
    settings: HuggingFaceText | None


def generation_settings(source: str) -> dict[str, Any]:
    """Return the generation settings beside a model; none where there is no file of them."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(source)
    except OSError:
        return {}
    return dict(found.to_diff_dict())


def read_tokenizer(
    source: str, generation: dict[str, Any], options: dict[str, Any]
) -> SourceTokenizer:
    """Return the tokenizer of ``source``, whose texts end by the settings ``generation``.

    ``options`` go to transformers. The source's own file is taken where it gives the ids that
    transformers has, otherwise what transformers makes of the source's files. Raises UserError for
    a tokenizer that is none of the tokenizers library.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils.hub import cached_file

    def file(name: str) -> bytes | None:
        found = None
        if "gguf_file" not in options:
            found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found).read_bytes()

    if get_tokenizer_config(source).get("tokenizer_class") == TOKENIZER_CLASS:
        content = file(_SENTENCEPIECE)
        if content is None:
            raise UserError(f"{source} has no {_SENTENCEPIECE}, which its tokenizer is made of")
        return SourceTokenizer(_SENTENCEPIECE, content, None)
    tokenizer: Any = AutoTokenizer.from_pretrained(source, **options)
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{source}: its tokenizer has no tokenizer.json, which is what runs use")
    settings = HuggingFaceText(tokenizer, generation, source)
    content = file(_JSON)
    if content is None or not _same_ids(content, tokenizer):
        content = backend.to_str().encode()
    return SourceTokenizer(_JSON, content, settings)


def read_own_tokenizer(source: str) -> SourceTokenizer:
    """Return the tokenizer of one of our own exports: the file of its run.

    Raises UserError where there is none.
    """
    from transformers.utils.hub import cached_file

    for name in FILE_NAMES:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return SourceTokenizer(name, Path(found).read_bytes(), None)
    raise UserError(f"{source} has no tokenizer, expected one of {', '.join(FILE_NAMES)}")


def _same_ids(content: bytes, tokenizer: Any) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        write_bytes(Path(folder) / _JSON, content)
        ids = Tokenizer.load(folder).encode(_COMPARED)
    return ids == list(tokenizer.encode(_COMPARED, add_special_tokens=False))
