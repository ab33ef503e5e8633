"""Plans of runs in which some of the parameters do not learn."""

from __future__ import annotations

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.model.freezing import matches
from pretrain.model.language_model import LanguageModel
from pretrain.planner.estimate import Planner
from pretrain.planner.fake_group import planned_context
from pretrain.planner.hardware import load_hardware
from pretrain.planner.parts import model_parts
from pretrain.planner.search import _try
from tests.helpers.processes import ROOT

VOCAB, FROZEN = 256, ["embedding", "blocks.0", "blocks.*.mlp"]


def planner(*freeze: str, pattern: str = "2*(attn gdn)", hardware: str = "h100") -> Planner:
    train = TrainConfig(
        steps=1, seq_len=64, precision="bf16", global_batch_tokens=512, freeze=list(freeze)
    )
    config = RunConfig("test", ModelConfig(pattern, 64, tie_embeddings=False), train=train)
    return Planner(config, VOCAB, load_hardware(ROOT / f"configs/hardware/{hardware}.yaml"))


def parameters(planned: Planner, *, learning: bool) -> int:
    with torch.device("meta"):
        model = LanguageModel(planned.config.model, VOCAB, planned_context(torch.bfloat16, 1))
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if not (learning and matches(name, planned.config.frozen))
    )


@pytest.mark.parametrize(
    ("layout", "devices", "gradient", "state"),
    [
        ({"zero_stage": 0}, 1, 4, 12),  # float32: two moments and a copy of bf16
        ({"zero_stage": 1}, 4, 4, 12 / 4),
        ({"zero_stage": 2, "zero_backend": "deepspeed"}, 4, 4 / 4, 12 / 4),
        ({"zero_stage": 3, "zero_backend": "deepspeed"}, 4, 4 / 4, 12 / 4),
    ],
)
def test_what_does_not_learn_has_neither_gradients_nor_state(layout, devices, gradient, state):
    frozen, plain = planner(*FROZEN), planner()
    parallel = ParallelConfig(micro_batch_size=1, **layout)
    ((found,), (whole,)) = (p.state_memory(parallel, devices) for p in (frozen, plain))
    learned = parameters(frozen, learning=True)
    assert 0 < learned < 0.7 * parameters(plain, learning=True)
    assert found["weights"] == whole["weights"]
    assert found["gradients"] == gradient * learned
    float32 = 3 * 4 * 64  # gates that gdn keeps in float32 have no copy, here of at most so many
    assert found["optimizer"] == pytest.approx(state * learned, abs=4 * float32)


def test_gradients_go_no_further_down_than_something_learns():
    top = ["embedding", "blocks.[0-2]"]
    parallel = ParallelConfig(micro_batch_size=1)
    plain, found = (p.estimate(parallel, 2) for p in (planner(), planner(*top)))
    (before,), (after,) = plain.stages, found.stages
    assert after.forward == before.forward
    # Three of four blocks run forward alone, and keep nothing.
    units = planner(*top).units(parallel, "none").blocks
    assert (
        after.hardware_flops < before.hardware_flops - 2 * 3 * units["attn, frozen"].forward.flops
    )
    assert found.memory["activations"] < 0.7 * plain.memory["activations"]
    assert found.sent["data parallel"] == pytest.approx(6 / 2 * after.learning)
    assert found.seconds["optimizer"] < plain.seconds["optimizer"]


def test_frozen_weights_cost_no_gradients_of_weights():
    plain, frozen = (planner(*f).units(ParallelConfig(), "none").blocks for f in ([], ["blocks.1"]))
    attention, gdn = plain["attn"], frozen["gdn, frozen"]
    assert frozen["attn"].backward.flops == attention.backward.flops
    assert gdn.forward.flops == plain["gdn"].forward.flops
    assert gdn.backward.flops < 0.8 * plain["gdn"].backward.flops


def test_blocks_of_which_a_part_is_frozen_are_a_kind_of_their_own():
    planned = planner("blocks.*.mlp", "blocks.2", "blocks.1.mixer_norm")
    units = planned.units(ParallelConfig(), "none")
    assert units.kinds == [
        "attn, mlp frozen",
        "gdn, mixer_norm mlp frozen",
        "attn, frozen",
        "gdn, mlp frozen",
    ]
    parts = model_parts(planned.config.model, VOCAB, 64, units.kinds)
    assert [part.name for part in parts][1:-1] == units.kinds
    assert sum(p.number * p.parameters for p in parts) == planned.counts.parameters


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["head.weights"], "has 'head.weights', which matches no parameter; expected names"),
        (["*"], r"freeze, \*, leave the model nothing to learn; expected fewer patterns"),
    ],
)
def test_patterns_that_match_nothing_or_all_are_refused(patterns, words):
    with pytest.raises(UserError, match=words):
        planner(*patterns).estimate(ParallelConfig(), 1)


def test_a_stage_in_which_nothing_learns_is_refused_as_in_training():
    planned, layout = planner("embedding", "blocks.[0-2]"), ParallelConfig(pipeline=2)
    planned.config.data.path, planned.config.schedule.warmup_steps = "x", 0
    with pytest.raises(UserError, match="leave a stage of the model nothing to learn; expected"):
        planned.estimate(layout, 2)
    tried = _try(planned, layout, 2, "none")
    assert tried.estimate is None and "leave a stage of the model nothing to learn" in tried.why
    assert _try(planned, ParallelConfig(micro_batch_size=1), 2, "none").why == ""
