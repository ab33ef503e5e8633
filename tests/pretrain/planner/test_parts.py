"""The parts of the planner's table add up to the model, and are what running them counts."""

from typing import Any

import pytest

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.model.counts import count_model
from pretrain.planner.estimate import Planner
from pretrain.planner.hardware import load_hardware
from pretrain.planner.parts import model_parts
from tests.helpers.planner_figures import plan
from tests.helpers.small_mixers import SMALL

VOCAB = 128
BASE = {
    "hidden_size": 48,
    "pattern": "4*attn",
    "mixers": {name: SMALL[name][0] for name in ("attn", "gdn")},
    "mlp": {"kind": "swiglu", "intermediate_size": 96},
}
LORA = {"times": 3, "lora_rank": 4}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"pattern": "3*gdn attn", "tie_embeddings": True},
    "moe": {"moe": {"num_experts": 4, "top_k": 2, "intermediate_size": 32, "first_dense": 1}},
    "recursion": {"recursion": {"prelude": 1, "coda": 1, "times": 2, "adapter": True}},
    "halting": {"recursion": {"times": 2, "step_signal": "learned", "halting": True}},
    "exits": {"recursion": {"prelude": 1, "coda": 1, "times": 3, "exit_weight": 0.1}},
    "lora": {"recursion": LORA},
    "lora-inside": {"pattern": "3*attn gdn attn", "recursion": {"prelude": 1, "coda": 1, **LORA}},
    "lora-moe": {
        "moe": {"num_experts": 4, "top_k": 2, "intermediate_size": 32, "first_dense": 1},
        "recursion": {"prelude": 2, "adapter": True, **LORA},
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up_to_the_model(name):
    config = build_config(ModelConfig, {**BASE, **MODELS[name]}, "case")
    counts, parts = count_model(config, VOCAB, 64), model_parts(config, VOCAB, 64)
    assert sum(part.number * part.parameters for part in parts) == counts.parameters
    assert sum(part.used * part.flops for part in parts) == counts.flops_per_token


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_its_gradient_and_state_once(name):
    config = build_config(ModelConfig, {**BASE, **MODELS[name]}, "case")
    train = TrainConfig(steps=1, seq_len=64)
    planner = Planner(RunConfig("test", config, train=train), VOCAB, load_hardware("cpu"))
    (held,) = planner.state_memory(ParallelConfig(), 1)
    whole = 4 * planner.counts.parameters
    assert held == {"weights": whole, "gradients": whole, "optimizer": 2 * whole}


@pytest.mark.parametrize("name", ["lora", "lora-inside"])
def test_parts_with_low_rank_differences_are_what_running_them_counts(name):
    model = {**BASE, **MODELS[name]}
    settings = {
        "model": model,
        "parallel": {"micro_batch_size": 2},
        "seq_len": 128,
        "rows": 2,
        "precision": "float32",
        "checkpointing": "none",
    }
    found = plan({name: {"settings": settings, "devices": 1}})[name]
    parts = model_parts(build_config(ModelConfig, model, "case"), VOCAB, 128)
    blocks = {part.name: part for part in parts if part.name in found["parameters"]}
    assert list(blocks) == list(found["parameters"])
    for kind, part in blocks.items():
        assert found["parameters"][kind] == part.parameters
        assert found["forward"][kind] == pytest.approx(256 * part.flops, rel=0.005)
        assert found["backward"][kind] == pytest.approx(2 * 256 * part.flops, rel=0.15)
