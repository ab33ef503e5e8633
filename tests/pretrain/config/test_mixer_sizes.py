"""Sizes that a config leaves out follow the model's width; saved runs keep theirs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import yaml

from evals.perplexity import evaluate_perplexity
from pretrain.checkpoint.state import check_same_model, read_state
from pretrain.common.config_loader import NULL_ALLOWED, ConfigError, field_types
from pretrain.config import (
    ModelConfig,
    RunConfig,
    legacy,
    load_run_config,
    load_saved_config,
    to_yaml,
)
from pretrain.inference.load import load_model
from pretrain.model.counts import count_model
from pretrain.model.spec import block_specs, with_sizes
from pretrain.nn.mixers import registry
from pretrain.run_directory import RunDirectory, find_checkpoint

EARLIER = Path(__file__).parents[2] / "data" / "run-v1"


@pytest.mark.parametrize("hidden_size", [1, 7, 16, 24, 32, 48, 64, 100, 768, 1024, 2048, 4096])
@pytest.mark.parametrize("name", registry())
def test_default_sizes_fit_every_width(name, hidden_size):
    model = ModelConfig(name, hidden_size)
    (spec,) = block_specs(model)
    kinds = field_types(type(spec.config))
    derived = [size for size, kind in kinds.items() if NULL_ALLOWED in get_args(kind)]
    sizes = {size: getattr(spec.config, size) for size in derived}
    assert sizes or hasattr(spec.config, "expand")  # which makes it all relative
    assert all(isinstance(size, int) and size >= 1 for size in sizes.values())
    parameters = spec.mixer.num_parameters(spec.config, hidden_size)
    if hidden_size >= 64:  # no layer costs much more than attention does
        assert 2 * hidden_size**2 < parameters < 9 * hidden_size**2
    # Written out, they are the same model, and stay it.
    written = with_sizes(model)
    assert block_specs(written) == [spec]
    assert with_sizes(written) == written


@pytest.mark.parametrize(
    ("name", "hidden_size", "sizes"),
    [
        ("attn", 768, {"num_heads": 12, "num_kv_heads": 12, "head_dim": 64}),
        ("attn", 4096, {"num_heads": 32, "num_kv_heads": 32, "head_dim": 128}),
        ("gdn", 2048, {"num_heads": 6, "head_dim": 256}),
        ("deltanet", 2048, {"num_heads": 16, "head_dim": 128}),
        ("kda", 2048, {"num_heads": 16, "head_dim": 128}),
        ("delta_product", 1024, {"num_heads": 8, "head_dim": 128}),
        ("m2rnn", 1024, {"num_heads": 84, "head_dim": 64, "value_dim": 16}),
        ("mamba2", 2048, {"head_dim": 64, "state_size": 128}),
        ("hgrn2", 2048, {"num_heads": 16, "head_dim": 128}),
        ("retnet", 2048, {"num_heads": 8, "head_dim": 256}),
        ("gla", 2048, {"num_heads": 4, "head_dim": 256}),
        ("rat", 2048, {"num_heads": 16, "head_dim": 128, "num_qk_groups": 2}),
        ("para_gru", 2048, {"num_heads": 4, "head_dim": 512}),
        ("slstm", 2048, {"num_heads": 4, "head_dim": 512}),
    ],
)
def test_default_sizes_are_the_published_ones(name, hidden_size, sizes):
    (spec,) = block_specs(ModelConfig(name, hidden_size))
    assert {size: getattr(spec.config, size) for size in sizes} == sizes


@pytest.mark.parametrize(
    ("name", "given", "found"),
    [
        ("attn", {"num_heads": 2}, {"num_heads": 2, "num_kv_heads": 2, "head_dim": 48}),
        ("attn", {"head_dim": 32}, {"num_heads": 3, "num_kv_heads": 3, "head_dim": 32}),
        ("attn", {"num_kv_heads": 3}, {"num_heads": 3, "num_kv_heads": 3, "head_dim": 32}),
        ("gdn", {"num_heads": 2}, {"num_heads": 2, "head_dim": 32}),
        ("gdn", {"head_dim": 8}, {"num_heads": 9, "head_dim": 8}),
        ("hgrn2", {"head_dim": 24}, {"num_heads": 4, "head_dim": 24}),
        ("hgrn2", {"num_heads": 3}, {"num_heads": 3, "head_dim": 32}),
        ("gla", {"num_heads": 2}, {"num_heads": 2, "head_dim": 24}),
        ("m2rnn", {"num_qk_heads": 3}, {"num_heads": 12, "value_dim": 16}),
        ("rat", {"num_qk_groups": 3}, {"num_heads": 3, "head_dim": 32}),
        ("mamba2", {"num_groups": 3}, {"head_dim": 64}),
    ],
)
def test_sizes_that_are_given_decide_the_others(name, given, found):
    (spec,) = block_specs(ModelConfig(name, 96, mixers={name: given}))
    assert {size: getattr(spec.config, size) for size in found} == found


def test_blocks_follow_a_config_that_changes():
    model = ModelConfig("attn", 64)
    first = block_specs(model)
    assert block_specs(model) == first and block_specs(model) is not first
    model.mixers["attn"] = {"num_heads": 1}
    assert block_specs(model)[0].config.num_heads == 1
    model.hidden_size, model.pattern = 768, "2*attn"
    assert [s.config.head_dim for s in block_specs(model)] == [768, 768]


def test_saved_runs_say_their_format_and_every_size(tmp_path):
    model = with_sizes(ModelConfig("gdn attn", 64, mixers={"gdn": {"expand_v": 1.0}}))
    config = RunConfig("test", model)
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    values = yaml.safe_load(saved.read_text())
    assert values["format"] == legacy.FORMAT
    mixers = values["model"]["mixers"]
    assert {"expand_v": 1.0, "num_heads": 3, "head_dim": 16}.items() <= mixers["gdn"].items()
    assert {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16}.items() <= mixers["attn"].items()
    for spec in block_specs(model):  # the other settings too
        assert mixers[spec.name].keys() == {f.name for f in dataclasses.fields(spec.config)}
    assert values["model"]["mlp"]["intermediate_size"] == 176
    assert load_saved_config(saved) == config
    saved.write_text(to_yaml(config).replace("format: 2", "format: 3"))
    with pytest.raises(ConfigError, match=r"format is 3, expected 1 to 2: .* later version"):
        load_saved_config(saved)


def test_a_saved_config_may_be_a_run_s_own(tmp_path):
    config = load_run_config(EARLIER / "run.yaml")
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path / "again.yaml") == config


def test_a_run_of_the_earlier_format_keeps_the_sizes_of_its_time():
    checkpoint = find_checkpoint(EARLIER / "runs" / "small")
    state = read_state(checkpoint)
    for model in (
        load_saved_config(EARLIER / "runs" / "small" / "config.yaml").model,
        load_saved_config(checkpoint / "config.yaml").model,
        state.model_config,
    ):
        attention = block_specs(model)[1].config
        assert (attention.num_heads, attention.head_dim) == (8, 2)
        recorded = json.loads((EARLIER / "runs/small/model.json").read_text())
        counted = count_model(model, state.vocab_size, 64)
        assert counted.parameters == recorded["parameters"]


def test_going_on_with_such_a_run_keeps_its_sizes_too(tmp_path):
    shutil.copytree(EARLIER / "runs" / "small", tmp_path / "small")
    config = load_run_config(EARLIER / "run.yaml", [f"directory={tmp_path / 'small'}"])
    assert block_specs(config.model)[1].config.num_heads == 4
    RunDirectory(config.run_directory).keep_saved_sizes(config)
    assert block_specs(config.model)[1].config.num_heads == 8
    checkpoint = find_checkpoint(config.run_directory)
    state = read_state(checkpoint)
    check_same_model(state, with_sizes(config.model), state.vocab_size, checkpoint)
    # What is given, is given; and a run of another width is another run.
    config.model.mixers["attn"] = {"num_heads": 2}
    RunDirectory(config.run_directory).keep_saved_sizes(config)
    assert config.model.mixers["attn"]["num_heads"] == 2
    config.model.mixers, config.model.hidden_size = {}, 32
    RunDirectory(config.run_directory).keep_saved_sizes(config)
    assert config.model.mixers == {}


@pytest.mark.usefixtures("processes")
def test_its_weights_still_compute_what_they_did():
    recorded = json.loads((EARLIER / "expected.json").read_text())
    for averaged, key in ((False, "nats_per_token"), (True, "nats_per_token_ema")):
        loaded = load_model(EARLIER / "runs" / "small", averaged=averaged)
        assert loaded.run.model.mixers["attn"] == {"num_heads": 8}
        scored = evaluate_perplexity(loaded, data=str(EARLIER / "data" / "code"))
        assert scored["nats_per_token"] == pytest.approx(recorded[key], rel=1e-5)
