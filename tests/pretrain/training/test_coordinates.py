"""Activations and updates keep their size with the width: the coordinate check, of every layer."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from pretrain.common.config_loader import ConfigError
from pretrain.config import OptimizerConfig, ParallelConfig
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.model.recursion import Recursion
from pretrain.model.spec import block_specs
from pretrain.model.widths import widened
from pretrain.nn.maximal_update import elementwise_lr_multiple, start_multiple
from pretrain.nn.mixers import registry
from pretrain.nn.parameters import info_of
from pretrain.optim.optimizer import lr_multiple
from pretrain.parallel.context import ParallelContext
from pretrain.training.coordinates import EXIT_NOT_FLAT, main
from pretrain.training.engine import Engine
from tests.helpers.coordinates import BASE, VOCAB, rows, settings
from tests.helpers.training_run import Run

LOOP: dict[str, Any] = {
    "pattern": "attn gdn attn",
    "recursion": {
        "prelude": 1,
        "coda": 1,
        "times": 2,
        "adapter": True,
        "halting": True,
        "step_signal": "learned",
        "lora_rank": 2,
    },
}
EXPERTS: dict[str, Any] = {
    "pattern": "attn attn",
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "intermediate_size": 64,
        "shared_intermediate_size": 64,
    },
}
# Two kinds of layers to a model: each row of the table is of one of them.
PAIRS = [
    f"{first} {second}"
    for first, second in itertools.zip_longest(
        list(registry())[::2], list(registry())[1::2], fillvalue="attn"
    )
]
MODELS: dict[str, dict[str, Any]] = {
    **{pair: {"pattern": pair} for pair in PAIRS},
    "loop": LOOP,
    "experts": EXPERTS,
    "untied": {"pattern": "gdn attn", "tie_embeddings": False},
    "gelu, sandwich": {"pattern": "gdn attn", "mlp": {"kind": "gelu"}, "block_norm": "sandwich"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_sizes_do_not_follow_the_width(name, kind):
    # Mamba-3's output has no norm, so its size depends on the few time steps that are drawn.
    found = rows(kind, seeds=8 if "mamba3" in name.split() else 3, **MODELS[name])
    assert {row.name: row.faults for row in found.values() if row.faults} == {}
    layers = [row for row in found.values() if row.layer]
    assert len(layers) == 3 * len(MODELS[name]["pattern"].split())
    for row in layers:
        assert abs(row.activation_slope.mean) < 0.3, row
        assert abs(row.update_slope.mean) < 0.3, row


def faults(kind, **model):
    found = rows(kind, seeds=4, **model)
    return {row.name for row in found.values() if row.faults}


def test_a_rate_of_muon_that_falls_as_adamws_is_found(monkeypatch):
    assert faults("muon", pattern="attn") == set()
    monkeypatch.setattr("pretrain.optim.muon.orthogonal_lr_multiple", elementwise_lr_multiple)
    assert {"attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.up_proj"} <= faults(
        "muon", pattern="attn"
    )


def test_a_matrix_that_knows_nothing_of_the_width_is_found(monkeypatch):
    loop = {"pattern": "attn", "recursion": {"times": 2, "adapter": True}}
    assert "recursion.adapter" not in faults("adamw", **loop)
    made = Recursion._replicated
    monkeypatch.setattr(
        Recursion, "_replicated", lambda self, shape, init, role="input": made(self, shape, init)
    )
    assert "recursion.adapter" in faults("adamw", **loop)


def test_the_standard_parametrization_is_not_flat():
    found = rows("adamw", seeds=4, pattern="gdn", mup_base_hidden_size=None)
    assert "output grows" in found["gdn.q_proj"].faults
    assert found["gdn.q_proj"].update_slope.mean > 0.5


# Roles


def parameters(config):
    with torch.device("meta"):
        return dict(LanguageModel(config, VOCAB, ParallelContext()).named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_roles_say_what_grows(name):
    """Of every parameter, by comparing its shape with that in a wider model."""
    config = settings(**MODELS[name])
    wide = parameters(widened(config, 4 * BASE))
    for key, narrow in parameters(config).items():
        info = info_of(wide[key])
        if key.startswith(("embedding", "head", "recursion.step_signal")):
            assert lr_multiple(info, "adamw", 1e-3) == lr_multiple(info, "muon", 1e-3) == 1
            continue
        if key.startswith("tables"):  # a vector for each block
            assert info.role == "input"
            continue
        shapes = zip(narrow.shape, wide[key].shape, strict=True)
        grows = [after > before for before, after in shapes]
        if sum(grows) == 2:
            assert info.role == "hidden", key
        elif narrow.ndim > 1 and grows[-1] and not grows[0] and "conv" not in key:
            assert info.role in ("bottleneck", "output"), key
        else:
            assert info.role == "input", key
        if info.role != "input":
            assert info.width == 4, key


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_parameters_start_and_learn_by_their_role(kind):
    config = settings(**LOOP, moe=EXPERTS["moe"])
    wide = widened(config, 4 * BASE)
    model = build_model(wide, VOCAB, seed=0)
    plain = build_model(dataclasses.replace(wide, mup_base_hidden_size=None), VOCAB, seed=0)
    expected = {
        "adamw": {"input": 1, "hidden": 1 / 4, "bottleneck": 1 / 4, "output": 1 / 4},
        "muon": {"input": 1, "hidden": 1 / 2, "bottleneck": 1 / 4, "output": 1 / 4},
    }
    seen = set()
    for (name, p), q in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        info = info_of(p)
        rule = kind if info.matrix else "adamw"
        if info.width == 4:
            seen.add(info.role)
            assert lr_multiple(info, kind, 1e-3) == expected[rule][info.role], name
        if info.width == 4 and "lora_a" not in name:  # whose start has its inputs' number in it
            assert torch.allclose(p, q[1] * start_multiple(info.role, 4)), name
    assert seen == {"input", "hidden", "bottleneck", "output"}


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weights_forget_as_fast_at_every_width(kind):
    for width in (BASE, 4 * BASE):
        model = build_model(widened(settings(**LOOP), width), VOCAB, seed=0)
        optimizer = OptimizerConfig(kind=kind, lr=1e-2, weight_decay=0.3)
        engine = Engine(model, optimizer, ParallelConfig(zero_stage=0))
        groups = engine.backend.optimizer.param_groups
        engine.backend.set_hyperparameters(groups, 1e-2)
        for group in groups:
            decays = any(info_of(p).weight_decay for p in group["params"])
            wanted = 0.3 * 1e-2 if decays else 0.0
            assert group["lr"] * group["weight_decay"] == pytest.approx(wanted)
        assert (len({group["lr"] for group in groups}) > 1) == (width > BASE)


# Widths


def test_a_wider_model_has_more_heads_of_the_same_size():
    config = settings(pattern="attn swa", mixers={"swa": {"num_heads": 4, "num_kv_heads": 1}})
    attn, swa = (spec.config for spec in block_specs(widened(config, 4 * BASE)))
    assert (attn.num_heads, attn.num_kv_heads, attn.head_dim) == (16, 16, 16)
    assert (swa.num_heads, swa.num_kv_heads, swa.head_dim) == (16, 1, 16)
    experts = widened(settings(**EXPERTS), 4 * BASE).moe
    assert experts is not None and experts.intermediate_size == 256
    odd = settings(pattern="attn", mixers={"attn": {"num_heads": 3, "head_dim": 8}})
    with pytest.raises(ConfigError, match=r"attn\.num_heads is 3 .* expected a width .* of 64"):
        widened(odd, 96)


@pytest.mark.parametrize("name", registry())
def test_sizes_of_heads_that_are_not_given_are_the_base_models(name):
    config = settings(pattern=name)
    at_base, wide = (
        block_specs(dataclasses.replace(config, hidden_size=w))[0].config for w in (BASE, 4 * BASE)
    )
    sizes = [size for size in at_base.head_sizes if hasattr(at_base, size)]
    assert sizes or not at_base.head_sizes
    for size in sizes:
        assert getattr(wide, size) == getattr(at_base, size)


@pytest.mark.parametrize("width", [256, 1024, 2048, 4096])
def test_heads_that_share_keys_keep_their_size_as_well(width):
    config = settings(
        pattern="attn", mixers={"attn": {"num_kv_heads": 2}}, mup_base_hidden_size=256
    )
    attn = block_specs(dataclasses.replace(config, hidden_size=width))[0].config
    assert (attn.num_heads, attn.num_kv_heads, attn.head_dim) == (width // 64, 2, 64)


# The command


def test_the_command_prints_and_draws(tmp_path, corpus, capsys):
    run = Run(tmp_path, corpus, "run", steps=4)
    picture = tmp_path / "pictures" / "coordinates.png"
    few = ["--seeds", "3", "--steps", "2", "--picture", str(picture)]
    status = main(
        [str(run.config), "model.mup_base_hidden_size=24", *few, "--widths", "24", "48", "96"]
    )
    printed = capsys.readouterr().out
    assert status in (0, EXIT_NOT_FLAT)
    for word in ("maximal update from width 24", "gdn.q_proj", "0 gdn", "1 attn", "mlp.down_proj"):
        assert word in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([str(run.config), *few, "--widths", "24", "192"]) == EXIT_NOT_FLAT
    assert "standard parametrization" in capsys.readouterr().out
