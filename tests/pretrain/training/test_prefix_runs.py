"""Runs with prefixes: what they log, how they are scored, and which are refused."""

from __future__ import annotations

import pytest

from evals.perplexity import evaluate_perplexity
from pretrain.common.config_loader import ConfigError
from pretrain.common.errors import UserError
from pretrain.config import load_run_config
from pretrain.inference.load import load_model
from pretrain.model.layout import check_layout
from pretrain.training.trainer import Trainer
from tests.helpers.training_run import QUICK, Run

pytestmark = pytest.mark.usefixtures("no_groups")
MIXERS = "{jrt: {num_heads: 2, feature_dim: 3, prefix_length: 12}, attn: {num_heads: 4}}"
PREFIXED = (
    *QUICK,
    "model.pattern=jrt attn",
    f"model.mixers={MIXERS}",
    "data.prefix.tokens=12",
    "data.prefix.mask_fraction=0.3",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    run = Run(tmp_path_factory.mktemp("prefixes"), corpus, "prefixed", steps=8)
    assert Trainer(run.config, overrides=PREFIXED).fit().status == "completed"
    return run


def test_the_loss_of_hidden_tokens_has_a_name_of_its_own(run):
    lines = [row for row in run.metrics if "loss" in row]
    assert all(row["masked_loss"] > 0 for row in lines)
    assert lines[-1]["masked_loss"] < lines[0]["masked_loss"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    valid = [row for row in run.metrics if "valid_loss" in row]
    assert all("masked_loss" not in row for row in valid)
    assert valid[-1]["valid_tokens"] < 128  # of 128, some lie in prefixes


def test_the_windows_of_validation_are_scored_again(run):
    loaded = load_model(run.directory)
    found = evaluate_perplexity(loaded, training_windows=True)
    last = [row for row in run.metrics if "valid_loss" in row][-1]
    assert found["tokens"] == last["valid_tokens"]
    assert found["nats_per_token"] == pytest.approx(last["valid_loss"], rel=1e-6)
    log = (run.directory / "log.txt").read_text()
    assert f"python -m evals {run.directory} --training-windows" in log
    with pytest.raises(UserError, match=r"was trained with data.prefix .* --training-windows"):
        evaluate_perplexity(loaded)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("parallel.context=2", r"parallel.context is 2 with data.prefix, .* expected 1"),
        ("train.segment_tokens=32", r"train.segment_tokens is 32 with data.prefix"),
        ("train.carry_state=true", r"train.carry_state is true with data.prefix"),
        ("data.prefix.fraction=0", r"data.prefix.fraction.* 0"),
        ("data.prefix.length=any", r"data.prefix.length is 'any'.*fixed"),
        ("data.prefix.mask_fraction=1.5", r"data.prefix.mask_fraction is 1.5"),
        ("model.pattern=attn", r"data.prefix is set, but no layer sees a prefix"),
        ("data.prefix.tokens=13", r"data.prefix.tokens is 13, but mixer 'jrt' .* first 12 tokens"),
        ("data.prefix=null", r"mixer 'jrt' sees a document's first 12 tokens .* data.prefix"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, corpus, change, error):
    run = Run(tmp_path, corpus, "refused")
    changes = [*PREFIXED, "parallel.micro_batch_size=1", change]
    if change == "model.pattern=attn":
        changes.append("model.mixers={attn: {num_heads: 4}}")
    if change == "data.prefix=null":
        changes = [x for x in changes if not x.startswith("data.prefix.")]
    with pytest.raises(ConfigError, match=error):
        check_layout(load_run_config(run.config, changes), 1, "test")


def test_a_vocabulary_without_a_row_for_the_mask_token_is_refused(tmp_path, corpus):
    run = Run(tmp_path, corpus, "refused")
    with pytest.raises(ConfigError, match=r"mask token of data.prefix is id \d+, but model.vocab"):
        Trainer(run.config, overrides=[*PREFIXED, "data.prefix.mask_id=100000"]).fit()
