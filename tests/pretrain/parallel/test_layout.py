"""Layouts that cannot work, or would train something else, are refused or put right beforehand."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.common.config_loader import ConfigError, build_config
from pretrain.common.errors import UserError
from pretrain.config import (
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    check_run_config,
    load_run_config,
)
from pretrain.model.layout import check_layout
from pretrain.model.stages import Stage, balance, split_into_stages
from pretrain.nn.mixers import registry
from pretrain.nn.parameters import info_of
from pretrain.parallel.context import current_context
from pretrain.parallel.megatron import transformer_config
from pretrain.parallel.processes import order_kernels
from pretrain.training.engine import Engine
from tests.helpers.small_training import make

RECURSIVE = {"prelude": 1, "coda": 1, "times": 3}


def run_config(pattern="4*gdn", recursion=None, batch=1024, **parallel):
    model = build_config(
        ModelConfig,
        {
            "hidden_size": 24,
            "pattern": pattern,
            "recursion": recursion,
            "vocab_size": 64,
            "mixers": {
                "gdn": {"num_heads": 4, "head_dim": 4},
                "attn": {"num_heads": 4, "head_dim": 6},
            },
        },
        "test",
    )
    config = RunConfig("test", model, parallel=ParallelConfig(micro_batch_size=2, **parallel))
    config.train = TrainConfig(steps=100, seq_len=32, global_batch_tokens=batch)
    config.data.path = "somewhere"
    return config


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"pipeline": 2, "zero_stage": 2, "zero_backend": "deepspeed"},
            "zero_stage is 2 with parallel.pipeline 2: .*; expected zero_stage 0 or 1, or "
            "pipeline 1",
        ),
        ({"zero_stage": 2}, "which the megatron backend does not have; .*zero_backend=deepspeed"),
        ({"virtual_pipeline": 2}, "virtual_pipeline is 2, which needs parallel.pipeline above 1"),
        ({"offload": "cpu"}, "offload is cpu, expected device, or .*zero_backend=deepspeed"),
        (
            {"offload": "nvme", "offload_path": "x", "zero_stage": 2, "zero_backend": "deepspeed"},
            "offload is nvme with parallel.zero_stage 2, expected 3",
        ),
        (
            {"offload": "nvme", "zero_stage": 3, "zero_backend": "deepspeed"},
            "offload_path None, expected a folder",
        ),
        ({"offload_path": "x"}, "offload is device and parallel.offload_path x, expected"),
        ({"sequence": True}, "over parallel.tensor processes, found 1"),
        ({"context": 3}, "context is 3, but parallel.context = 3 does not divide .* 32 tokens"),
        (
            {"context": 8, "tensor": 8, "sequence": True},
            "parallel.context x parallel.tensor = 64 does not divide .* 32 tokens",
        ),
        (
            {"context": 2, "zero_backend": "deepspeed"},
            "context is 2, which the deepspeed backend does not have; expected 1, or",
        ),
        ({"context": 2, "zero_stage": 2}, "which the megatron backend does not have"),
    ],
)
def test_settings_that_exclude_each_other(parallel, message):
    with pytest.raises(ConfigError, match=message):
        check_run_config(run_config(**parallel), "test")


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "model",
            {"moe": {"num_experts": 4, "intermediate_size": 8, "capacity_factor": 1.25}},
            "with model.moe.capacity_factor 1.25",
        ),
        ("train", {"precision": "fp8"}, "with train.precision fp8"),
    ],
)
def test_what_depends_on_a_whole_micro_batch_is_not_shared_over_time(section, values, message):
    config = run_config(context=2)
    for name, value in values.items():
        given = build_config(MoEConfig, value, "test") if name == "moe" else value
        setattr(getattr(config, section), name, given)
    with pytest.raises(ConfigError, match=f"context is 2 {message}"):
        check_run_config(config, "test")


def test_states_whose_size_the_next_process_cannot_know_are_not_handed_on(monkeypatch):
    kind, config = registry()["sliced_attn"], run_config("2*sliced_attn", context=2)
    check_layout(config, 2, "test")  # packed along the first axis
    monkeypatch.setattr(kind, "init_state", lambda self, n: {"k": torch.zeros(n, 0, 4)})
    check_layout(run_config("2*sliced_attn"), 2, "test")
    message = "context is 2, but the state of mixer 'sliced_attn' grows .* along another axis"
    with pytest.raises(ConfigError, match=message):
        check_layout(config, 2, "test")


@pytest.mark.parametrize(
    ("config", "processes", "message"),
    [
        (
            run_config(tensor=2, context=2),
            6,
            r"tensor x parallel.context x parallel.pipeline is 2 x 2 x 1 = 4, but there are 6",
        ),
        (run_config(tensor=2, pipeline=2), 6, "2 x 2 = 4, but there are 6 processes; .* 4$"),
        (run_config(tensor=3), 3, "parallel.tensor is 3, which does not divide 4 .*fits 1, 2, 4"),
        (run_config(pipeline=8), 8, "8 stages, but the model has 4 blocks and a head; .*most 5"),
        (
            run_config(recursion=RECURSIVE, pipeline=5),
            5,
            "a recursive loop cannot be cut, which leaves 3 units .*at most 4",
        ),
        (run_config(recursion={**RECURSIVE, "normalize_state": True}, pipeline=3), 3, "at most 2"),
        (run_config(), 3, r"multiple of .* = 32 x 2 x 3 = 192"),
        (
            run_config(pipeline=2, virtual_pipeline=2, batch=192),
            2,
            "has 3 micro-batches per step; .* a multiple of parallel.pipeline = 2 is expected",
        ),
    ],
)
def test_layouts_that_do_not_fit_are_refused_before_any_process_meets_another(
    config, processes, message
):
    with pytest.raises(UserError, match=message):
        check_layout(config, processes, "test")
    assert not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def test_a_layout_in_words():
    parallel = ParallelConfig(tensor=2, pipeline=4)
    assert parallel.describe(16) == (
        "16 processes (2 tensor-parallel x 4 pipeline stages x 2 data-parallel)"
    )
    assert ParallelConfig().describe(1) == "1 process"
    assert ParallelConfig(context=4).describe(8) == (
        "8 processes (4 context-parallel x 2 data-parallel)"
    )


@given(costs=st.lists(st.integers(1, 9), min_size=1, max_size=9), count=st.integers(1, 9))
def test_stages_are_as_even_as_any_division(costs, count):
    if count > len(costs):
        with pytest.raises(ValueError, match="do not make"):
            balance(costs, count)
        return

    def groups(ends):
        return [sum(costs[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def divisions(start, left):
        if left == 1:
            yield [len(costs)]
            return
        for end in range(start + 1, len(costs) - left + 2):
            for rest in divisions(end, left - 1):
                yield [end, *rest]

    best = min((max(g), sum(x * x for x in g)) for g in map(groups, divisions(0, count)))
    found = groups(balance(costs, count))
    assert (max(found), sum(x * x for x in found)) == best


def test_stages_are_balanced_by_flops_not_by_blocks():
    """An expensive block counts for several; a large vocabulary makes the head a stage."""
    config = run_config("attn 5*gdn").model
    plain = split_into_stages(config, 64, 32, 2, "test")
    far = split_into_stages(config, 64, 200_000, 2, "test")  # attention looks at all of it
    assert far[0].blocks == range(1)
    assert len(plain[0].blocks) > 1
    head = split_into_stages(config, 1_000_000, 32, 2, "test")
    assert head == [Stage(range(6), True, False), Stage(range(6, 6), False, True)]
    looped = run_config("6*gdn", {"prelude": 1, "coda": 1, "times": 9}).model
    assert split_into_stages(looped, 64, 32, 3, "test")[1].blocks == range(1, 5)


@pytest.mark.parametrize(
    ("tensor", "set_before", "expected"), [(2, None, "1"), (2, "8", "8"), (1, None, None)]
)
def test_exchanges_come_before_the_products_beside_them(tensor, set_before, expected, monkeypatch):
    """GPUs keep to the order of kernels only with one connection."""
    if set_before is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    else:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", set_before)
    order_kernels(ParallelConfig(tensor=tensor))
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected


def test_a_vocabulary_that_is_not_known_yet_may_not_divide():
    """The tokenizer's, rounded up to 128, is read when processes have met."""
    config = run_config("4*attn", batch=192, tensor=3)
    config.model.mixers["attn"] = {"num_heads": 3, "head_dim": 8}
    config.model.mlp.intermediate_size, config.model.vocab_size = 48, None
    with pytest.raises(
        ConfigError, match=r"128, which parallel\.tensor = 3 does not .*multiple of 3"
    ):
        check_layout(config, 3, "test")
    config.model.vocab_size = 384
    check_layout(config, 3, "test")


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("parts", [None, 2])
def test_settings_of_megatron_that_go_wrong_silently_are_put_right(monkeypatch, parts):
    """Outputs are freed, messages between two processes not mixed up, and not waited for."""
    from megatron.core import parallel_state as state

    monkeypatch.setattr(state, "get_pipeline_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(state, "get_virtual_pipeline_model_parallel_world_size", lambda: parts)
    megatron = transformer_config(current_context(), hidden_size=24)
    assert megatron.deallocate_pipeline_outputs
    assert not megatron.batch_p2p_sync
    assert (megatron.batch_p2p_comm, megatron.overlap_p2p_comm) == (parts is None, parts == 2)


@pytest.mark.usefixtures("processes")
def test_deepspeed_compiles_nothing_on_a_cpu(monkeypatch):
    """Its shared-memory collectives take minutes, at the first start on every machine."""
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    loaded: list[str] = []
    monkeypatch.setattr(ShareMemCommBuilder, "load", lambda self: loaded.append("compiled"))
    Engine(make(), OptimizerConfig(), ParallelConfig(zero_backend="deepspeed"))
    backend = importlib.import_module("deepspeed.comm.torch")
    assert (backend.build_shm_op() is None, loaded) == (not torch.cuda.is_available(), [])


@pytest.mark.usefixtures("processes")
def test_what_is_not_a_matrix_is_not_decayed():
    """megatron-core's optimizer by itself applies weight decay to every group."""
    model = make()
    engine = Engine(model, OptimizerConfig(lr=1.0, weight_decay=0.5))
    engine.backend.forward_backward(
        []
    )  # none: zero gradients, so that nothing but decay moves weights
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.main_grad.zero_()
    engine.backend.optimizer_step(0.1, 0.0)
    for name, parameter in model.named_parameters():
        factor = 0.95 if info_of(parameter).weight_decay else 1.0
        assert torch.allclose(parameter, before[name] * factor), name


@pytest.mark.usefixtures("processes")
def test_gradient_norms_of_many_elements_are_exact():
    model = make()
    engine = Engine(model, OptimizerConfig(clip_grad=0.0))
    engine.backend.forward_backward([])
    for parameter in model.parameters():
        parameter.main_grad.normal_()
    model.embedding.weight.main_grad.fill_(1e-3)
    squares = sum(p.main_grad.double().square().sum() for p in model.parameters())
    norm, _ = engine.backend.optimizer_step(0.0, 0.0)
    assert norm == pytest.approx(float(squares) ** 0.5, rel=1e-9)


@pytest.mark.usefixtures("processes")
def test_deepspeed_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        Engine(make(), OptimizerConfig(), ParallelConfig(zero_backend="deepspeed"))


def test_deepspeed_divides_in_bf16():
    config = run_config(zero_backend="deepspeed", zero_stage=0)
    check_run_config(config, "test")
    config.train.precision = "bf16"
    with pytest.raises(ConfigError, match=r"expected zero_stage 1, or zero_backend=megatron"):
        check_run_config(config, "test")


def test_no_process_makes_a_sample_of_a_model_that_it_does_not_have():
    """Alone it would wait for the others for ever."""
    assert ParallelConfig().one_has_all
    assert ParallelConfig(context=2).one_has_all
    for parallel in (
        ParallelConfig(tensor=2),
        ParallelConfig(pipeline=2),
        ParallelConfig(zero_backend="deepspeed", zero_stage=3),
    ):
        assert not parallel.one_has_all


@pytest.mark.parametrize(
    "layout", [{"tensor": 2}, {"tensor": 4}, {"tensor": 2, "sequence": True}, {"pipeline": 2}]
)
def test_the_demo_can_be_trained_under_common_layouts_as_it_stands(layout):
    overrides = [f"parallel.{name}={value}" for name, value in layout.items()]
    config = load_run_config("configs/runs/demo.yaml", overrides)
    check_layout(config, config.parallel.model_size, "test")
