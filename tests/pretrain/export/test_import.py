"""Imports: their tokenizer is the source's file, and our own exports come back."""

from __future__ import annotations

import json

import pytest
import torch

from data_prep.prepare import prepare
from evals.perplexity import evaluate_perplexity
from pretrain.common.errors import UserError
from pretrain.config import InitializeConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.inference.load import load_model
from pretrain.model.build import build_model
from pretrain.training.initialization import initialize_from
from tests.helpers.data_preparation import files_config
from tests.helpers.small_model import settings

pytest.importorskip("transformers")
from pretrain.export.hugging_face import write_hugging_face, write_tokenizer
from pretrain.export.importing import import_model
from tests.helpers.small_llama import make_llama

pytestmark = pytest.mark.usefixtures("processes")
LLAMA = {"pattern": "2*attn", "hidden_size": 32, "mixers": {"attn": {"num_heads": 4}}}


@pytest.fixture(scope="module")
def texts(text_folder):
    return sorted(text_folder.glob("*.txt"))[:6]


@pytest.mark.parametrize("kind", ["prepends BOS", "set by a setting", "words with spaces"])
def test_data_of_the_same_tokenizer_is_accepted_whichever_came_first(kind, tmp_path, texts):
    source, run = make_llama(tmp_path / "llama", kind), tmp_path / "run"
    checkpoint = import_model(str(source), run)
    loaded = load_model(run)
    given = {"source": source, "run": run, "step": checkpoint}
    for name, tokenizer in given.items():
        manifest = prepare(files_config(tmp_path / "data" / name, texts, tokenizer))
        model = build_model(loaded.model.model_config, loaded.model.vocab_size, seed=0)
        from_import = InitializeConfig(checkpoint=str(run))
        initialize_from([model], from_import, manifest.tokenizer.sha256)
        assert torch.equal(model.embedding.weight, loaded.model.embedding.weight)
        if manifest.tokenizer.lossless:
            found = evaluate_perplexity(loaded, data=str(tmp_path / "data" / name), max_tokens=100)
            assert found["bos_rule"].startswith("each document is opened by the imported model's")


def test_data_of_another_tokenizer_is_refused_with_what_would_do(tmp_path, texts):
    sources = [make_llama(tmp_path / name, name) for name in ("adds nothing", "words with spaces")]
    import_model(str(sources[0]), tmp_path / "run")
    manifest = prepare(files_config(tmp_path / "data", texts, sources[1]))
    loaded = load_model(tmp_path / "run")
    with pytest.raises(UserError, match=r"prepare it with tokenizer: .path: .*step-00000000.$"):
        evaluate_perplexity(loaded, data=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"prepare the data with tokenizer: .path: .*step-00000000"):
        initialize_from(
            [loaded.model],
            InitializeConfig(checkpoint=str(tmp_path / "run")),
            manifest.tokenizer.sha256,
        )


def test_a_file_that_transformers_reads_differently_is_not_taken(tmp_path):
    """Imported is then what transformers makes of it: scores are those of its ids."""
    source = make_llama(tmp_path / "llama", "words with spaces")
    path = source / "tokenizer_config.json"
    settings_of_it = {**json.loads(path.read_text()), "tokenizer_class": "GPT2Tokenizer"}
    path.write_text(json.dumps(settings_of_it))
    import_model(str(source), tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    assert loaded.imported is not None
    assert loaded.tokenizer.encode("some text") == loaded.imported.encode("some text", False)
    assert loaded.tokenizer.sha256 != Tokenizer.load(source).sha256


def test_an_export_with_our_tokenizer_comes_back_with_it(tmp_path, model_file):
    """Without a question about code, and read as the run was: no tokenizer of transformers."""
    tokenizer = Tokenizer.load(model_file)
    model = build_model(settings(**LLAMA, vocab_size=1024), 1024, seed=4).eval()
    write_hugging_face(model, tmp_path / "hf", 64, tokenizer.eod_id, torch.float32)
    write_tokenizer(tokenizer, tmp_path / "hf")
    import_model(str(tmp_path / "hf"), tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    assert loaded.tokenizer.sha256 == tokenizer.sha256 and loaded.imported is None
    assert loaded.opening_id == tokenizer.eod_id


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
def test_an_export_of_any_layers_comes_back_bit_for_bit(kind, tmp_path, model_file):
    """Its own code is not run, and rows that no token has are there again."""
    path = model_file
    if kind == "tokenizer.json":
        path = make_llama(tmp_path / "llama", "adds nothing") / "tokenizer.json"
    tokenizer = Tokenizer.load(path)
    rows = tokenizer.vocab_size + 24
    config = settings(
        pattern="gdn attn mamba2",
        recursion={"prelude": 1, "times": 2, "lora_rank": 2, "adapter": True},
        moe={"num_experts": 4, "intermediate_size": 16, "bias_update_rate": 0.1},
        tie_embeddings=False,
    )
    model = build_model(config, rows, seed=4).eval()
    write_hugging_face(model, tmp_path / "hf", 64, 1, torch.float32, tokenizer.vocab_size)
    write_tokenizer(tokenizer, tmp_path / "hf")
    (tmp_path / "hf/modeling_hybrid.py").write_text("raise RuntimeError('run')")
    import_model(str(tmp_path / "hf"), tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    assert loaded.model.vocab_size == rows and loaded.run.train.seq_len == 64
    assert loaded.tokenizer.sha256 == tokenizer.sha256 and loaded.imported is None
    found = dict(loaded.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter)


def damaged(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_export_that_is_damaged_is_named(tmp_path, model_file):
    model = build_model(settings(), 1024, seed=4).eval()
    write_hugging_face(model, tmp_path / "hf", 64, 1, torch.float32)
    with pytest.raises(UserError, match=r"hf has no tokenizer, expected one of tokenizer.model"):
        import_model(str(tmp_path / "hf"), tmp_path / "run")
    write_tokenizer(Tokenizer.load(model_file), tmp_path / "hf")
    damaged(tmp_path / "hf", embedding_rows=1000)
    with pytest.raises(UserError, match=r"model.embedding.weight is \(1024, 24\), expected \(1000"):
        import_model(str(tmp_path / "hf"), tmp_path / "run")
    damaged(tmp_path / "hf", embedding_rows=None)
    with pytest.raises(UserError, match=r"config.json is of no export that this version reads"):
        import_model(str(tmp_path / "hf"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_with_code_of_its_own_is_refused_without_a_question(tmp_path, model_file):
    model = build_model(settings(), 1024, seed=4).eval()
    write_hugging_face(model, tmp_path / "hf", 64, 1, torch.float32)
    write_tokenizer(Tokenizer.load(model_file), tmp_path / "hf")
    damaged(tmp_path / "hf", model_type="somebody_elses")
    with pytest.raises(UserError, match="its model_type is somebody_elses, expected one of bamba,"):
        import_model(str(tmp_path / "hf"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
