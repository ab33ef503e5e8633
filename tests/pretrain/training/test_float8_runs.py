"""Runs in fp8: which projections they are of, resuming in bf16 and back, and what is refused."""

from __future__ import annotations

import pytest

from benchmarks.float8_cpu import losses, model_config
from pretrain.common.config_loader import ConfigError, build_config
from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.model.float8 import _chosen, check_float8_layout, count_projections
from pretrain.model.language_model import LanguageModel
from pretrain.nn.mixers import registry
from pretrain.parallel.context import ParallelContext
from pretrain.run_directory import RunDirectory
from pretrain.training.trainer import Trainer
from tests.helpers import processes
from tests.helpers.training_run import QUICK, Run

pytest.importorskip("torchao")

MIXERS = "model.mixers={gdn: {num_heads: 2, head_dim: 16}, attn: {num_heads: 2}}"
WIDE = (*QUICK, "model.hidden_size=32", "model.mlp.intermediate_size=64", MIXERS)


@pytest.mark.usefixtures("no_groups")
def test_a_run_goes_on_in_bf16_and_back(run):
    def fit(precision, steps):
        given = (f"train.precision={precision}", f"train.steps={steps}", "sample.tokens=4")
        return Trainer(run.config, overrides=[*WIDE, "schedule.kind=constant", *given]).fit()

    for steps, precision in ((2, "fp8"), (4, "bf16"), (6, "fp8")):
        assert fit(precision, steps).step == steps
    said = RunDirectory(run.directory).log_file.read_text()
    assert "fp8 in 15 of 17 projections, emulated, else bf16, " in said
    assert "  train.precision: fp8 -> bf16\n" in said
    assert "  train.precision: bf16 -> fp8\n" in said
    with pytest.raises(UserError, match=r"trained with train.precision fp8, the config says float"):
        fit("float32", 8)


@pytest.mark.slow
def test_the_command_on_two_tensor_parallel_processes_equals_one(tmp_path, corpus):
    run = Run(tmp_path, corpus, "verified")
    mixers = "model.mixers={gdn: {num_heads: 2, head_dim: 32}, attn: {num_heads: 4}}"
    done = processes.run(
        *("pretrain", "verify", run.config, "--processes", 2, "train.precision=fp8"),
        *("model.hidden_size=64", "model.mlp.intermediate_size=128", mixers),
        *("parallel.tensor=2", "parallel.sequence=true"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal in fp8" in done.stdout


def settings(pattern, **changes):
    values = {"hidden_size": 64, "pattern": pattern, **changes}
    return build_config(ModelConfig, values, "test")


def test_gates_decays_and_the_head_are_not_in_float8():
    model = LanguageModel(
        settings("gdn kda gla mamba2 m2rnn hgrn2 attn", tie_embeddings=False),
        64,
        ParallelContext(),
    )
    chosen = {name for name, _ in _chosen(model)}
    assert not any(name.endswith(("a_proj", "b_proj", "dt_proj", "_up")) for name in chosen)
    assert "head" not in chosen
    assert "blocks.4.mixer.f_proj" not in chosen  # of M2RNN, one number for each head
    assert {"blocks.5.mixer.f_proj", "blocks.6.mixer.q_proj", "blocks.6.mlp.up_proj"} <= chosen


@pytest.mark.parametrize("name", registry())
def test_every_mixer_has_projections_in_float8(name):
    chosen, every = count_projections(settings(f"2*{name}", mlp={"kind": "none"}))
    assert 4 <= chosen <= every
    assert count_projections(settings(name, hidden_size=40, mlp={"kind": "none"}))[0] == 0


def test_a_layout_that_leaves_too_few_channels_is_refused():
    config = settings("attn", mlp={"ratio": 2})
    check_float8_layout(config, 2, "test")
    with pytest.raises(ConfigError, match=r"fp8 and parallel.tensor 8, .* 64 / 8 outputs of mixer"):
        check_float8_layout(config, 8, "test")


@pytest.mark.slow
@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("family", ["transformer", "gdn-hybrid", "mamba2"])
def test_losses_are_those_of_bf16(family):
    """The full comparison is benchmarks/results/float8_cpu.txt."""
    fp8, bf16 = (losses(family, precision, 80) for precision in ("fp8", "bf16"))
    assert fp8 != bf16
    assert fp8[-1] < fp8[0] - 0.5
    assert sum(fp8[-20:]) / 20 == pytest.approx(sum(bf16[-20:]) / 20, abs=0.02)
    chosen, every = count_projections(model_config(family))
    assert 0 < chosen <= every
