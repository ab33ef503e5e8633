"""Evaluation in a run: scores in its log and files, and a run that does not notice."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")

from tests.helpers import processes
from tests.helpers.training_run import Run

pytestmark = pytest.mark.slow
EVAL = (
    "eval.tasks=[text_parity@4,text_mqar@2]",
    "eval.every=8",
    "eval.limit=5",
    "eval.max_length=120",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("in-loop")
    found = [Run(folder, corpus, name) for name in ("with", "without")]
    for run, options in zip(found, (EVAL, ()), strict=True):
        status, output = run.finish(*options)
        assert status == 0, output
    return found


def test_scores_are_in_the_log_and_in_files(runs):
    rows = [r for r in runs[0].metrics if any(k.startswith("eval/") for k in r)]
    assert [r["step"] for r in rows] == [8, 16]
    for row in rows:
        assert 0 <= row["eval/text_parity@4/acc"] <= 1
        assert 0 <= row["eval/text_mqar@2/contains"] <= 1
    path = runs[0].directory / "evals" / "text_parity@4-step-00000016-in-training.json"
    result = json.loads(path.read_text())
    assert result["scores"]["acc"] == rows[-1]["eval/text_parity@4/acc"]
    assert (result["step"], result["documents"], result["max_length"]) == (16, 5, 120)
    assert "opened by the end-of-document token" in result["bos_rule"]


def test_training_is_bit_equal(runs):
    measured = [[r for r in run.losses if len(r) > 2] for run in runs]
    assert measured[0] == measured[1]
    assert {"loss", "grad_norm"} < measured[0][-2].keys() and "valid_loss" in measured[0][-1]


def test_the_command_gives_the_same_scores_afterwards(runs):
    done = processes.run(
        "evals",
        runs[0].directory,
        *("--tasks", "text_parity@4,text_mqar@2", "--limit", "5", "--max-length", "120"),
    )
    assert done.returncode == 0, done.stderr
    assert "text_parity@4" in done.stdout and "written to" in done.stdout
    for name in ("text_parity@4", "text_mqar@2"):
        paths = sorted((runs[0].directory / "evals").glob(f"{name}-step-00000016*.json"))
        results = [json.loads(p.read_text()) for p in paths]
        assert len(results) == 2
        assert results[0]["scores"] == results[1]["scores"]


def test_what_cannot_be_scored_is_refused_before_a_step(runs, tmp_path, corpus):
    run = Run(tmp_path, corpus, "refused")
    status, output = run.finish("eval.tasks=[perplexity]")
    assert status == 2 and "eval.tasks names 'perplexity', which scores checkpoints alone" in output
    assert not run.losses
