"""A run directory of an earlier version: resumed, scored, exported and reported.

``tests/data/run-v1`` is one, with what the code that made it found; see its README.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.checkpoint_folders import checkpoint_name
from pretrain.run_directory import RunDirectory, find_checkpoint

ROOT = Path(__file__).parents[1]
EARLIER = Path(__file__).parent / "data" / "run-v1"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())
NAME = "runs/small"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("earlier") / "run-v1"
    shutil.copytree(EARLIER, path)
    return path


def command(folder, *words):
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("weights", "key"), [("last", ""), ("ema", "_ema")])
def test_it_is_scored(folder, weights, key):
    checkpoint = RunDirectory(NAME).checkpoints / checkpoint_name(8)
    command(folder, "evals", str(checkpoint), "--weights", weights)
    mark = "-ema" if key else ""
    path = RunDirectory(folder / NAME).evals / f"perplexity-{checkpoint_name(8)}{mark}.json"
    result = json.loads(path.read_text())
    assert result["nats_per_token"] == pytest.approx(EXPECTED[f"nats_per_token{key}"], rel=1e-5)


def test_it_is_exported(folder):
    pytest.importorskip("transformers")
    exported = folder / "exported"
    checkpoint = RunDirectory(NAME).checkpoints / checkpoint_name(8)
    command(folder, "pretrain", "export", str(checkpoint), str(exported))
    assert json.loads((exported / "config.json").read_text())["hidden_size"] == 16
    assert (exported / "model.safetensors").stat().st_size > 0


def test_it_is_reported(folder):
    command(folder, "evals", "report", NAME, "--out", "report")
    pages = [path.read_text() for path in (folder / "report").glob("*.html")]
    assert len(pages) == 1 and "small" in pages[0]


def test_it_is_resumed(folder, tmp_path):
    shutil.copytree(EARLIER, tmp_path / "again")
    output = command(tmp_path / "again", "pretrain", "run.yaml", "train.steps=12", "--force")
    assert f"resumed from {find_checkpoint(Path(EARLIER / NAME)).relative_to(EARLIER)}" in output
    rows = RunDirectory(tmp_path / "again" / NAME).read_metrics()
    losses = {str(row["step"]): row["loss"] for row in rows if "loss" in row and row["step"] > 8}
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-5)
    (valid,) = [row["valid_loss"] for row in rows if row["step"] == 12 and "valid_loss" in row]
    assert valid == pytest.approx(EXPECTED["valid_loss"], rel=1e-5)
