"""Run settings: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.common.config_loader import ConfigError, load_config
from pretrain.config import (
    MLPConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RecursionConfig,
    RunConfig,
    TrainConfig,
    load_run_config,
    load_saved_config,
    to_yaml,
)
from pretrain.model.counts import count_model
from pretrain.model.spec import block_specs

BASE = """
name: test
model:
  hidden_size: 32
  pattern: gdn attn
  mixers: {gdn: {num_heads: 2, head_dim: 8}, attn: {num_heads: 4}}
data: {path: data/stdlib}
schedule: {warmup_steps: 2}
train: {steps: 10, seq_len: 16, global_batch_tokens: 64}
parallel: {micro_batch_size: 2}
"""
CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "runs").glob("*.yaml"))


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_valid(path, tmp_path, monkeypatch):
    # What it makes of the model of another run, which is not there.
    monkeypatch.chdir(tmp_path)
    made = ["model.pattern=2*(gdn attn)", "model.hidden_size=128"]
    config = load_run_config(path, made if path.stem in ("convert", "convert-smollm2") else [])
    assert count_model(config.model, 4096, config.train.seq_len).parameters > 0


def test_extends_overrides_and_saving(base, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("extends: run.yaml\nname: child\noptimizer: {lr: 1e-2}\n")
    config = load_run_config(child, ["optimizer.weight_decay=0", "--train.steps=7"])
    assert (config.name, config.model.hidden_size) == ("child", 32)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.01, 0.0)
    assert config.train.num_steps == 7
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(RunConfig, saved) == config


def test_tokens_are_a_budget_too(base):
    config = load_run_config(base, ["train.steps=null", "train.tokens=1000"])
    assert config.train.num_steps == 16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", r"unknown setting 'optimizer.lrr' \(did you mean 'lr'\?\)"),
        ("model.hidden_size=-4", "model.hidden_size is -4, expected at least 1"),
        ("model.hidden_size=abc", "model.hidden_size is 'abc', expected a whole number"),
        ("optimizer.lr=0", "optimizer.lr is 0.0, expected more than 0"),
        ("optimizer.betas=[0.9,1.0]", r"optimizer.betas is \[0.9, 1.0\], expected two numbers"),
        ("train.precision=fp4", "'fp4' .did you mean 'fp8'.., expected one of: float32, bf16, fp8"),
        (
            "train={precision: fp8, seq_len: 12, global_batch_tokens: 48}",
            "fp8 with seq_len x micro_batch_size = 24 tokens, expected a multiple of 16",
        ),
        ("train.tokens=5", "expected exactly one of them"),
        ("train.steps=null", "expected exactly one of them"),
        ("parallel.micro_batch_size=3", "expected a multiple of seq_len x micro_batch_size = 48"),
        ("schedule.warmup_steps=11", "warmup_steps is 11, more than the 10 steps of the run"),
        ("schedule.kind=cosin", r"'cosin' \(did you mean 'cosine'\?\)"),
        ("data.path=null", "expected either data.path or data.blend to be set"),
        ("name=..", "expected a plain name for a folder"),
        ("schedule={kind: wsd, warmup_steps: 9}", "but the decay begins after 8 of the 10 steps"),
        ("name=a/b", "expected a plain name for a folder"),
        ("steps", "expected key=value"),
    ],
)
def test_wrong_settings_are_named(base, override, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config(base, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.pattern=gdn atn", r"model.pattern 'gdn atn': unknown mixer 'atn'"),
        ("model.mixers.attn.num_heads=5", "num_heads is 5, which does not divide hidden_size 32"),
        ("model.mixers.attn.num_kv_heads=3", "num_kv_heads is 3, which does not divide num_heads"),
        (
            "model.mixers.gdn={num_heads: 4, head_dim: 8, num_qk_heads: 3}",
            "num_qk_heads is 3, which does not divide num_heads 4",
        ),
        ("model.block_norm=behind", "block_norm is 'behind'.*expected one of: pre, sandwich, post"),
        ("model.block_norms={gdm: post}", r"block_norms.gdm: unknown mixer \(did you mean 'gdn'"),
        ("model.block_norms.gdn=1", "block_norms.gdn is 1, expected text"),
        ("model.mixers.attn.qk_norm_over=width", "qk_norm_over is width, but qk_norm is false"),
        ("model.moe={shared_gate: true}", "shared_gate is true, but model.moe.shared_intermediate"),
        ("model.residual_scale=0", "model.residual_scale is 0.0, expected more than 0"),
        ("model.mixers.gdn.heads=3", r"unknown setting 'heads'.*known: num_heads"),
        ("model.mixers.gdn.expand_v=0.3", "head_dim . expand_v is 2.4, expected a whole number"),
        ("model.mixers.gnd.heads=3", r"unknown mixer 'gnd' \(did you mean 'gdn'\?\)"),
        ("model.mixers.swa={kind: [1]}", r"model.mixers.swa: unknown mixer '\[1\]'"),
        ("model.mixers.attn=3", "model.mixers.attn is 3, expected a mapping"),
    ],
)
def test_wrong_models_are_named(base, override, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config(base, [override])


def test_a_variant_of_a_mixer_under_its_own_name(base):
    config = load_run_config(
        base,
        ["model.mixers.swa={kind: attn, num_heads: 4, window: 8}", "model.pattern=gdn swa attn"],
    )
    specs = block_specs(config.model)
    assert [s.name for s in specs] == ["gdn", "swa", "attn"]
    assert (specs[1].config.window, specs[2].config.window) == (8, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text + "future: 1\n", "unknown setting 'future'"),
        (lambda text: text.replace("train:\n", "train:\n  future: 1\n"), "setting 'train.future'"),
        (lambda text: text.replace("format: 2", "format: 9"), "format is 9, expected 1 to 2"),
    ],
)
def test_a_run_of_a_later_version_is_told_by_its_path(base, tmp_path, change, words):
    saved = tmp_path / "saved.yaml"
    saved.write_text(change(to_yaml(load_run_config(base))))
    with pytest.raises(ConfigError, match=words) as error:
        load_saved_config(saved)
    later = "a later version of this project has written it: use that one"
    assert str(error.value).startswith(f"{saved}: ")
    assert later in str(error.value)
    with pytest.raises(ConfigError, match=later):  # given to a command as a config
        load_run_config(saved)


def test_a_setting_that_a_person_has_misspelt_is_of_no_later_version(base):
    with pytest.raises(ConfigError, match="unknown setting 'future'") as error:
        load_run_config(base, ["future=1"])
    assert "later version" not in str(error.value)


def test_files_that_are_no_config(tmp_path):
    (tmp_path / "demo.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"no config file at .* \(did you mean 'demo.yaml'\?\)"):
        load_run_config(tmp_path / "deno.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_run_config(tmp_path / "demo.yaml")
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load_run_config(tmp_path / "loop.yaml")


def test_a_model_made_in_python_is_checked_too():
    with pytest.raises(ConfigError, match=r"^ModelConfig: hidden_size is -3, expected at least 1$"):
        ModelConfig(pattern="attn", hidden_size=-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig("gnd", 64), r"^ModelConfig: pattern 'gnd': .*did you mean 'gdn'"),
        (
            lambda: ModelConfig("attn", 64, mixers={"attn": {"num_head": 3}}),
            r"^ModelConfig: mixers\.attn: unknown setting 'num_head'",
        ),
        (
            lambda: ModelConfig("attn", 64, recursion=RecursionConfig(prelude=1)),
            r"^ModelConfig: recursion: prelude 1 and coda 0 leave nothing",
        ),
        (
            lambda: ModelConfig("attn", 64, moe=MoEConfig(), mlp=MLPConfig("none")),
            r"^ModelConfig: moe takes the place of MLPs, but mlp\.kind is none",
        ),
        (lambda: MoEConfig(num_experts=2, top_k=4), "^MoEConfig: top_k is 4, expected at most"),
        (lambda: RecursionConfig(state_init="zeros"), "^RecursionConfig: state_init is zeros"),
        (lambda: OptimizerConfig(betas=[2, 3]), r"^OptimizerConfig: betas is \[2.0, 3.0\]"),
        (lambda: TrainConfig(steps=5, tokens=4), "^TrainConfig: steps is 5 and tokens 4"),
        (lambda: TrainConfig(batch_warmup_start=64), "^TrainConfig: batch_warmup_start is 64"),
    ],
)
def test_sections_made_in_python_are_checked_across_fields(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_same_check_of_a_file_names_the_file_and_section(base):
    with pytest.raises(ConfigError, match=r"yaml: model\.moe\.top_k is 4, expected at most"):
        load_run_config(base, ["model.moe={num_experts: 2, top_k: 4}"])
