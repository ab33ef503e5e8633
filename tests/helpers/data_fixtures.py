"""Small corpora, tokenizers and data sets that several tests read."""

import os
import random

import pytest

from data_prep.config import SourceConfig, TokenizerConfig
from data_prep.prepare import prepare
from data_prep.source_kinds.stdlib import StandardLibrary
from data_prep.tokenizer_training import train_sentencepiece
from pretrain.data.tokenizer import Tokenizer
from tests.helpers.data_preparation import files_config

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def stdlib_documents():
    source = StandardLibrary(SourceConfig(name="stdlib", kind="stdlib"))
    return [
        document.content.decode()
        for file in range(source.file_count)
        for document in source.read(file)
    ]


@pytest.fixture(scope="session")
def model_file(tmp_path_factory, stdlib_documents):
    """A SentencePiece model trained on a little of the standard library."""
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    config = TokenizerConfig(vocab_size=1000)
    path.write_bytes(train_sentencepiece(stdlib_documents[:40], config))
    return path


@pytest.fixture(scope="session")
def tokenizer(model_file):
    return Tokenizer.load(model_file)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A folder of 60 text files, half a megabyte in all, each different."""
    folder = tmp_path_factory.mktemp("text")
    words = ["alpha", "beta", "gamma", "delta\n\n", "", "", "epsilon\tzeta", "é", "🙂", "theta"]
    for index in range(60):
        rng = random.Random(index)
        text = " ".join(rng.choices(words, k=300 + 50 * index))
        (folder / f"{index:03d}.txt").write_text(f"{index}\n{text}")
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory, text_folder, model_file):
    """A finished data set of the folder; do not change it."""
    output = tmp_path_factory.mktemp("data") / "small"
    prepare(files_config(output, [text_folder], model_file))
    return output
