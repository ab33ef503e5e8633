"""Attention layers ranked by what converting each alone costs."""

from __future__ import annotations

import json

import pytest
import torch

from evals.layers import _windows, convert_layer, divergence, main, rank_layers, take_layer
from pretrain.common.errors import UserError
from pretrain.config import load_run_config
from pretrain.model.spec import block_specs
from pretrain.parallel.processes import stop_processes
from pretrain.training.trainer import Trainer
from tests.helpers.loaded_model import loaded
from tests.helpers.training_run import QUICK, Run


def source(corpus, pattern="3*attn"):
    found = loaded(corpus, pattern=pattern)
    found.candidates = 300  # the embedding has 384 rows
    return found


@torch.no_grad()
def test_divergence_is_that_of_the_distributions(corpus):
    found = source(corpus)
    windows = _windows(found, None, 200, 0)
    assert divergence(found, found.model, windows)[0] == 0.0
    model = convert_layer(found, 1, "gdn", {}, "qkvo")
    total, count = 0.0, 0
    for _, group in windows:
        for window in group:
            ids = torch.from_numpy(window.inputs)[None]
            true, other = (
                torch.distributions.Categorical(logits=m(ids)[0, -window.scored :, :300])
                for m in (found.model, model)
            )
            total += float(torch.distributions.kl_divergence(true, other).sum())
            count += window.scored
    value, error = divergence(found, model, windows)
    assert error is not None and error > 0
    sampled = [len(group) < available for available, group in windows]
    assert all(sampled) and value == pytest.approx(total / count, rel=1e-9)


def test_a_layer_that_does_nothing_is_the_first_to_go(corpus):
    found = source(corpus, "attn gdn attn attn")
    with torch.no_grad():
        found.model.blocks[2].mixer.o_proj.weight.zero_()
    result = rank_layers(found, "gdn", tokens=200)
    assert sorted(row["layer"] for row in result["layers"]) == [0, 2, 3]
    costs = {row["layer"]: row["kl"] for row in result["layers"]}
    assert costs[2] == 0.0 and min(costs[0], costs[3]) > 0
    assert result["layers"][-1]["layer"] == 2
    assert result["keep"] == [result["layers"][0]["layer"]]  # a quarter of three
    assert result["keep_by_count"]["2"] == [0, 3] and result["keep_by_count"]["0"] == []
    wide = rank_layers(found, "swa", {"window": 16}, tokens=200, keep=2)
    assert all(row["kl"] < 1e-12 for row in wide["layers"])  # the window is the training length


@torch.no_grad()
def test_aligned_layers_take_their_places_one_at_a_time(corpus):
    found, aligned = source(corpus), source(corpus, "gdn attn gdn")
    model = take_layer(found, 2, aligned)
    assert [spec.name for spec in block_specs(model.model_config)][:2] == ["attn", "attn"]
    for name, parameter in model.named_parameters():
        origin = aligned if name.startswith("blocks.2.mixer.") else found
        assert torch.equal(parameter, origin.model.get_parameter(name).to(parameter.dtype)), name
    result = rank_layers(found, None, tokens=200, aligned=aligned)
    costs = {row["layer"]: row["kl"] for row in result["layers"]}
    windows = _windows(found, None, 200, 0)
    assert set(costs) == {0, 2} and costs[2] == divergence(found, model, windows)[0] > 0
    assert result["convert"] == {"gdn": "aligned"}
    for pattern, message in (
        ("gdn gdn", "of 2 blocks .* wide, expected a model without a loop, aligned with x, of 3"),
        ("3*attn", "where 0 mixers are in the place of attention of '3[*]attn', expected one"),
        ("gdn kda attn", "where 2 mixers are"),
        ("3*rwkv7", "whose rwkv7 layers share values; one alone cannot be taken"),
    ):
        with pytest.raises(UserError, match=message):
            rank_layers(found, None, aligned=source(corpus, pattern))


def test_wrong_questions_are_refused(corpus):
    found = source(corpus)
    for arguments, message in (
        ({"mixer": "gnd"}, r"--convert is 'gnd' \(did you mean 'gdn'\?\), expected one of"),
        ({"mixer": "para_gru"}, "which cannot take over attention; expected --start none"),
        ({"mixer": "gdn", "keep": 4}, "--keep is 4, but x has 3 attention layers"),
    ):
        with pytest.raises(UserError, match=message):
            rank_layers(found, **arguments)
    with pytest.raises(UserError, match=r"x is 'gdn', which has no attention to convert"):
        rank_layers(source(corpus, "gdn"), "kda")
    with pytest.raises(UserError, match="--metric is 'kl,speed', expected some of kl, recall"):
        main(["nowhere", "--convert", "gdn", "--metric", "kl,speed"])


def test_the_command_ranks_and_says_what_to_keep(tmp_path, corpus, capsys):
    pytest.importorskip("lm_eval")
    stop_processes()
    run = Run(tmp_path, corpus, "teacher", steps=2)
    Trainer(run.config, overrides=[*QUICK, "model.pattern=2*attn"]).fit()
    recall = ["--recall", "text_mqar@2", "--limit", "2", "--metric", "recall,kl"]
    options = ["--convert", "gdn", "--tokens", "200", "--keep", "1", *recall]
    assert main([str(run.directory), *options, "conv_size=2"]) == 0
    (path,) = (run.directory / "evals").glob("layers-gdn-step-00000002-*.json")
    found = json.loads(path.read_text())
    assert found["recall"]["task"] == "text_mqar@2" and found["metrics"] == ["recall", "kl"]
    assert all(row["kl"] > 0 and row["recall_stderr"] >= 0 for row in found["layers"])
    shown = capsys.readouterr().out
    assert f"initialize.keep={found['keep']}" in shown
    # What is printed is a setting of the next run.
    overrides = [f"initialize.keep={found['keep']}", f"initialize.checkpoint={run.directory}"]
    student = tmp_path / "student.yaml"
    text = run.config.read_text()
    student.write_text(text[: text.index("model:")] + text[text.index("data:") :])
    config = load_run_config(student, [*overrides, "initialize.convert={gdn: qkvo}"])
    assert sorted(config.model.pattern.split()) == ["attn", "gdn"]
