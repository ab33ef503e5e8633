"""Small corpora, tokenizers and data sets that several tests read."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.config import DataPrepConfig, SourceConfig, TokenizerConfig
from data_prep.config_files import build_config
from data_prep.prepare import prepare
from data_prep.sources import StandardLibrary
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_training import train_sentencepiece

os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).parents[2]


def command(*arguments, **options):
    """Start ``python -m data_prep`` as a person would."""
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run_command(*arguments):
    """The finished command: returncode, stdout, stderr."""
    process = command(*arguments)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def write_config(path, **settings):
    path.write_text(yaml.safe_dump(settings))
    return path


def files_config(output, paths, tokenizer, **settings):
    """A config of one source of files with an existing tokenizer."""
    values = {
        "output": str(output),
        "sources": [{"name": "text", "kind": "files", "paths": [str(p) for p in paths]}],
        "tokenizer": {"path": str(tokenizer)},
        "validation_fraction": 0.1,
        "shard_bytes": 100_000,
        "processes": 1,
        **settings,
    }
    return build_config(DataPrepConfig, values, "test")


def digests(directory):
    """Content of every file of a data set but the manifest, whose date differs."""
    return {p.name: p.read_bytes() for p in Path(directory).iterdir() if p.name != "manifest.json"}


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
def corpus(tmp_path_factory):
    """A folder of 60 text files, half a megabyte in all, each different."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["alpha", "beta", "gamma", "delta\n\n", "", "", "epsilon\tzeta", "é", "🙂", "theta"]
    for index in range(60):
        rng = random.Random(index)
        text = " ".join(rng.choices(words, k=300 + 50 * index))
        (folder / f"{index:03d}.txt").write_text(f"{index}\n{text}")
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory, corpus, model_file):
    """A finished data set of the corpus; do not change it."""
    output = tmp_path_factory.mktemp("data") / "small"
    prepare(files_config(output, [corpus], model_file))
    return output
