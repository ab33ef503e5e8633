import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.common.errors import UserError
from pretrain.data.tokenizer import Tokenizer, chunks

STUMBLING_BLOCKS = [
    "",
    " ",
    "  a  ",
    "\n",
    "\n\n\n",
    "\r\n",
    "\t\t x",
    "\0",
    "a\0b",
    "<eod>",
    "<unk>",
    "<0x41>",
    "<s></s>",
    "\u2581",
    "a\u2581\u2581 b \u2581",
    "\u2047 \u2585",
    "\u0301",
    "e\u0301 é ﬁ",
    "🙂👩‍👩‍👧",
    "\ufeff\u200b\u3000\u2028\uffff\U0010ffff",
    "    if x:\n\ty = 1  \n",
]


@pytest.fixture(scope="session")
def byte_level_file(tmp_path_factory, stdlib_documents):
    """A GPT-2-like tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(stdlib_documents[:20], trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="session", params=["sentencepiece", "huggingface"])
def any_tokenizer(request, model_file, byte_level_file):
    return Tokenizer.load(model_file if request.param == "sentencepiece" else byte_level_file)


def check(tokenizer, text):
    """Round trip, no special ids, exact bytes per token."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod_id not in ids
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", [*STUMBLING_BLOCKS, "<|endoftext|>"], ids=ascii)
def test_stumbling_blocks_come_back(any_tokenizer, text):
    check(any_tokenizer, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_comes_back(any_tokenizer, text):
    check(any_tokenizer, text)


def test_every_document_of_the_standard_library_comes_back(tokenizer, stdlib_documents):
    sizes = tokenizer.bytes_per_token()
    for document in stdlib_documents:
        ids = tokenizer.encode_to_array(document)
        assert tokenizer.decode(ids) == document
        assert sizes[ids].sum() == len(document.encode())


def test_chunks_leave_the_ids_as_they_are(tokenizer, model_file, stdlib_documents):
    whole = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    long = sorted(stdlib_documents, key=len)[-20:]
    assert all(len(text) > 50_000 for text in long)
    for text in long:
        assert tokenizer.encode(text) == whole.encode(text)


def test_a_very_long_line_comes_back(any_tokenizer):
    text = "one very long line, é " * 60_000
    assert len(list(chunks(text, 100))) > 1
    check(any_tokenizer, text)


@given(text=st.text("ab\n", max_size=60), size=st.integers(1, 20))
def test_chunks_are_the_text_cut_after_newlines(text, size):
    parts = list(chunks(text, size))
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts[:-1])


def test_end_of_document_is_dropped_in_decoding(any_tokenizer):
    ids = [*any_tokenizer.encode("a"), any_tokenizer.eod_id, *any_tokenizer.encode("b")]
    assert any_tokenizer.decode(np.array(ids)) == "ab"


def test_dtype_follows_megatron(model_file):
    from megatron.core.datasets.indexed_dataset import DType

    tokenizer = Tokenizer.load(model_file)
    assert tokenizer.encode_to_array("abc").dtype == np.uint16
    for size in (1000, 65_499, 65_500, 65_536, 200_000):
        tokenizer.vocab_size = size
        assert tokenizer.dtype == np.dtype(DType.optimal_dtype(size))


def test_a_folder_can_be_named(model_file, byte_level_file):
    assert Tokenizer.load(model_file.parent).kind == "sentencepiece"
    assert Tokenizer.load(byte_level_file.parent).kind == "huggingface"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.model", b"", "not a SentencePiece model"),
        ("a.model", b"no model", "not a SentencePiece model"),
        ("a.json", b"{}", "not a Hugging Face tokenizer.json"),
        ("a.json", b"\xff", "not a Hugging Face tokenizer.json"),
        ("a.txt", b"x", "expected a SentencePiece .model"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        Tokenizer.load(tmp_path / name)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer file at .*nope\.model"):
        Tokenizer.load(tmp_path / "nope.model")
    with pytest.raises(UserError, match="holds neither"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_normalizes_has_no_bytes_per_token(tmp_path, byte_level_file):
    spec = json.loads(byte_level_file.read_text())
    spec["normalizer"] = {"type": "NFC"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(path)
    assert not tokenizer.lossless
    with pytest.raises(UserError, match="does not restore text byte for byte"):
        tokenizer.bytes_per_token()


def test_a_default_sentencepiece_model_is_known_to_lose_whitespace(tmp_path, stdlib_documents):
    prefix = tmp_path / "default"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stdlib_documents[0].splitlines()),
        model_prefix=str(prefix),
        vocab_size=200,
        minloglevel=2,
    )
    tokenizer = Tokenizer.load(prefix.with_suffix(".model"))
    assert not tokenizer.lossless
    with pytest.raises(UserError, match="byte for byte"):
        tokenizer.bytes_per_token()


def test_a_tokenizer_without_an_end_is_refused(tmp_path, byte_level_file):
    text = byte_level_file.read_text().replace("<|endoftext|>", "<other>")
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(UserError, match="no token that ends a document"):
        Tokenizer.load(path)


def test_workers_import_nothing_heavy():
    code = "import sys, data_prep.workers; print([m for m in ('torch', 'megatron', 'datasets', "
    code += "'pyarrow', 'rich') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
