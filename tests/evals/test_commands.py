"""``python -m evals``: what is wrong is one sentence, before anything is computed."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.helpers import processes
from tests.helpers.training_run import Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    run = Run(tmp_path_factory.mktemp("scored"), corpus, "scored")
    status, output = run.finish("train.steps=3")
    assert status == 0, output
    return run


def evals(*words):
    return processes.run("evals", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", ","], "--tasks is empty"),
        (["--limit", "0"], "found '0', expected a whole number from 1"),
        (["--tasks", "passkey@x"], "expected passkey@LENGTH, such as passkey@1024"),
        (["--tasks", "passkey@9999", "--limit", "1"], "give --max-length 9999"),
        (["--stride", "3", "--carry-state"], "--stride is for overlapping windows"),
    ],
)
def test_bad_input_is_one_sentence(trained, words, message):
    done = evals(trained.directory, *words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_hugging_face_model_that_is_not_there(tmp_path):
    pytest.importorskip("transformers")
    done = evals(f"hf:{tmp_path / 'none'}", "--tasks", "text_parity")
    assert done.returncode == 2 and "could not be loaded" in done.stderr.splitlines()[-1]
    done = evals(f"hf:{tmp_path / 'none'}", "--tasks", "perplexity")
    assert "perplexity is scored on a run's own validation text" in done.stderr


def test_half_a_checkpoint_is_refused(trained, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(trained.directory, folder)
    (checkpoint,) = (folder / "checkpoints").glob("step-*3")
    largest = max(checkpoint.glob("*.distcp"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    done = evals(folder, "--tasks", "text_parity", "--limit", "2")
    assert done.returncode == 2
    assert f"{largest.name} has 100 bytes, expected" in done.stderr
    (checkpoint / "files.json").unlink()
    done = evals(checkpoint, "--tasks", "text_parity", "--limit", "2")
    assert done.returncode == 2 and "files.json is missing or unreadable" in done.stderr


def test_a_request_that_is_cut_is_said(trained):
    done = evals(trained.directory, "--tasks", "text_s5@30", "--limit", "2")
    assert done.returncode == 0, done.stderr
    assert "requests were longer than 32 tokens and lost their beginning" in done.stdout
    (path,) = (trained.directory / "evals").glob("text_s5@30-*.json")
    assert json.loads(path.read_text())["cut_requests"] == 8


def test_tasks_are_listed():
    done = evals("tasks")
    assert done.returncode == 0
    for name in ("hellaswag", "recall_squad_twice", "niah_multikey_3", "text_a5", "positions"):
        assert name in done.stdout


def test_validation_in_training_and_evals_agree_on_the_same_windows(tmp_path, corpus, other_corpus):
    """In all and by source, to rounding: micro-batches differ from passes in how sums are made."""
    run = Run(tmp_path, corpus, "blend")
    blend = f"data.blend=[{{path: {corpus}, weight: 1}}, {{path: {other_corpus}, weight: 2}}]"
    settings = ("data.path=null", blend, "train.steps=6", "validation.tokens=640")
    status, output = run.finish(*settings, "optimizer.lr=0.03", "sample.tokens=0")
    assert status == 0, output
    logged = [row for row in run.metrics if "valid_loss" in row][-1]
    done = evals(run.directory, "--training-windows")
    assert done.returncode == 0, done.stderr
    (path,) = (run.directory / "evals").glob("perplexity-*.json")
    scored = json.loads(path.read_text())
    pairs = [(scored, "")] + [(source, f"/{source['source']}") for source in scored["sources"]]
    assert len(pairs) == 3
    for found, name in pairs:
        assert found["tokens"] == logged[f"valid_tokens{name}"]
        for theirs, ours in (("nats_per_token", "loss"), ("bits_per_byte", "bits_per_byte")):
            assert found[theirs] == pytest.approx(logged[f"valid_{ours}{name}"], rel=1e-6)
    assert f"validation loss {logged['valid_loss']:.4f} nats per token" in output
    for source in scored["sources"]:
        name = source["source"]
        assert f"{name} {logged[f'valid_loss/{name}']:.4f}" in output
    assert abs(scored["sources"][0]["nats_per_token"] - scored["nats_per_token"]) > 1e-3
    done = evals(run.directory, "--max-tokens", 200, "--seed", 2)
    assert done.returncode == 0, done.stderr
    assert "±" in done.stdout and "by source" in done.stdout


def test_two_models_never_share_a_file(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from evals.commands import main
    from evals.harness import hugging_face

    def evaluate(source, names, **_):
        about = {"documents": 1, "documents_of_task": 1, "limit": None, "version": 1}
        for name in names:
            found = {"scores": {"acc": 1.0}, "intervals": {}, "chance": {}, "num_fewshot": 0}
            yield name, {**about, **found, "checkpoint": source}

    monkeypatch.setattr(hugging_face, "evaluate_hugging_face", evaluate)
    monkeypatch.chdir(tmp_path)
    sources = ["l-x", "l/x", "/l/x", "l x", "l%2Fx", "L/../x", "[red]"]
    for source in sources:
        assert main([f"hf:{source}", "--tasks", "text_parity"]) == 0
    files = list((tmp_path / "runs").rglob("*.json"))
    assert sorted(json.loads(file.read_text())["checkpoint"] for file in files) == sorted(sources)
