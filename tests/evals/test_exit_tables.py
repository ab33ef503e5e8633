"""What thresholds of exits cost on held-out text, against evaluations of fixed passes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import pretrain
from evals.commands import main as score
from evals.exits import evaluate_exits
from evals.exits import main as exits
from evals.perplexity import evaluate_perplexity
from evals.sampling import main as sample
from pretrain.common.errors import UserError
from pretrain.inference.exiting import ExitingModel
from pretrain.inference.exits import ExitRule
from pretrain.inference.passes import outputs_by_pass
from tests.helpers import processes
from tests.helpers.loaded_model import loaded
from tests.helpers.recursion_kinds import RECURRENT_DEPTH
from tests.helpers.training_run import Run

pytestmark = pytest.mark.usefixtures("processes")
SAMPLE: Any = {"max_tokens": 300}


@pytest.fixture(scope="module")
def model(corpus):
    return loaded(corpus, pattern="gdn attn gdn", recursion=RECURRENT_DEPTH)


def rule(text, **options):
    return ExitRule.parse(text, **options)


def test_fixed_passes_are_those_of_the_option(model):
    found = evaluate_exits(model, [rule("kl:inf"), rule("latent:0")], **SAMPLE)
    for times, bits in found["fixed_passes"].items():
        model.model.recursion.times = int(times)
        plain = evaluate_perplexity(model, **SAMPLE, seed=0)
        assert bits == pytest.approx(plain["bits_per_byte"], rel=1e-9)
    model.model.recursion.times = None
    first, last = found["exits"]
    for row, times in ((first, 1), (last, 3)):
        assert row["bits_per_byte"] == pytest.approx(found["fixed_passes"][str(times)], rel=1e-9)
        assert row["bits_per_byte_of_fixed_passes"] == row["bits_per_byte"] or times == 1
        assert row["depth"]["passes"] == {str(times): 1.0}
        assert row["depth"]["tokens"] == found["tokens"]
    assert last["depth"]["flops_per_token"] == last["depth"]["flops_per_token_of_all_passes"]
    assert first["depth"]["flops_per_token"] < last["depth"]["flops_per_token"]
    assert found["fixed_flops_per_token"]["3"] == last["depth"]["flops_per_token"]


def test_a_threshold_is_chosen_on_other_text(model):
    rules = [rule("latent:0"), rule("kl:inf"), rule("kl:inf", min_passes=2)]
    whole = evaluate_exits(model, rules, **SAMPLE)
    worse = whole["fixed_passes"]["1"] - whole["fixed_passes"]["3"]
    found = evaluate_exits(model, rules, tolerance=abs(worse) + 1.0, **SAMPLE)
    assert found["chosen"] == "kl:inf"
    assert sum(row["depth"]["tokens"] for row in found["exits"]) < 3 * whole["tokens"]
    for row in found["exits"]:
        assert row["bits_per_byte"] != row["chosen_on"]
    none = evaluate_exits(model, rules[1:2], tolerance=0.0, **SAMPLE)
    assert none["chosen"] in (None, "kl:inf")
    assert (none["chosen"] is None) == (
        none["exits"][0]["chosen_on"] > found["exits"][0]["chosen_on"]
    )


def test_the_exit_in_hindsight(model):
    found = evaluate_exits(model, [rule("kl")], **SAMPLE)["hindsight"]
    assert sum(share for name, share in found.items() if name != "mean") == pytest.approx(1)
    # Another text, in whole rows: the first pass whose likeliest token is the last one's.
    tokens = torch.randint(300, (1, 50))
    likeliest = np.array(
        [
            model.model.next_logits(rows)[:, : model.candidates].argmax(-1).numpy()
            for rows in outputs_by_pass(model.model, tokens)
        ]
    )
    assert likeliest.shape == (3, 50)
    plain = model.model(tokens)[0, :, : model.candidates].argmax(-1)
    assert np.array_equal(likeliest[-1], plain.numpy())
    assert 1 <= found["mean"] <= 3


def test_perplexity_reports_the_depth_of_the_scored_tokens(model):
    plain = evaluate_perplexity(model, **SAMPLE, seed=0)
    assert "depth" not in plain
    model.exits = model.reader = ExitingModel(model.model, rule("latent:0"), model.candidates)
    try:
        for carried in (False, True):
            plain = evaluate_perplexity(model, **SAMPLE, seed=0, carry_state=carried)
            depth = plain["depth"]
            assert depth["tokens"] == plain["tokens"]
            assert depth["mean_passes"] == 3
        with pytest.raises(UserError, match="--exit does not go with --training-windows"):
            evaluate_perplexity(model, training_windows=True)
    finally:
        model.exits, model.reader = None, model.model


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    run = Run(tmp_path_factory.mktemp("deep"), corpus, "deep")
    status, output = run.finish("train.steps=3", "model.recursion={prelude: 1, times: 3}")
    assert status == 0, output
    return run


@pytest.mark.slow
def test_the_commands(trained):
    few = ("--max-tokens", "300")
    done = processes.run("evals", trained.directory, *few, "--exit", "kl:inf", "--min-passes", "2")
    assert done.returncode == 0, done.stderr
    assert "passes of a token" in done.stdout
    (path,) = (trained.directory / "evals").glob("perplexity-*-exit-kl-inf-min-passes-2-*.json")
    found = json.loads(path.read_text())
    assert (found["exit"], found["min_passes"], found["depth"]["mean_passes"]) == ("kl:inf", 2, 2)
    done = processes.run("evals", "exits", trained.directory, *few, "--exit", "kl:inf")
    assert done.returncode == 0, done.stderr
    assert "in hindsight" in done.stdout
    tokens = ("--max-tokens", "8", "--temperature", "0", "--prompt", "def ")
    texts = []
    for options, told in (
        ((), "ended by"),
        (("--speculate", "3"), "drafted tokens accepted"),
        (("--exit", "latent:0"), "3.00 of 3 passes per token"),
    ):
        done = processes.run("evals", "sample", trained.directory, *tokens, *options)
        assert done.returncode == 0, done.stderr
        assert told in done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1] == texts[2]
    leaving: Any = pretrain.load(trained.directory, exits="latent:0")
    assert leaving.generate("def ", max_tokens=8) + "\n" == texts[0]
    assert leaving.exits is not None and leaving.exits.summary()["mean_passes"] == 3
    alone: Any = pretrain.load(trained.directory)
    assert alone.generate("def ", max_tokens=8, speculate="3:1") + "\n" == texts[0]
    with pytest.raises(UserError, match="speculate is 3:1, but tokens have exits"):
        leaving.generate("def ", speculate="3:1")
    with pytest.raises(UserError, match="speculate is 3:1, which is greedy, but temperature is 1"):
        alone.generate("def ", speculate="3:1", temperature=1.0)


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        (score, ["--exit", "kl:x"], "expected a number from 0 after 'kl:'"),
        (score, ["--exit-every", "2"], "--exit-every is for exits, but there is no --exit"),
        (score, ["--exit", "kl", "--tasks", "positions"], "positions is scored with all passes"),
        (exits, [], "there is no --exit, expected one or more"),
        (exits, ["--exit", "kl", "--tolerance", "-1"], "--tolerance is -1.0, expected a number"),
        (sample, ["--speculate", "3"], "gives greedy texts, but --temperature is 0.8"),
        (sample, ["--speculate", "x", "--temperature", "0"], "speculate is 'x', expected TOKENS"),
        (
            sample,
            ["--speculate", "3", "--temperature", "0", "--exit", "kl"],
            "checks drafts with all passes, but --exit is kl",
        ),
    ],
)
def test_bad_options_are_one_sentence_before_a_model_is_loaded(command, words, sentence):
    with pytest.raises(UserError, match=sentence):
        command(["runs/none", *words])
    with pytest.raises(UserError, match="is for checkpoints of runs, not for hf:none"):
        sample(["hf:none", "--temperature", "0", "--speculate", "2"])
