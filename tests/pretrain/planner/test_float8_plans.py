"""Plans of runs in fp8: faster products, casts beside them, and hardware that has none."""

from __future__ import annotations

import pytest

from benchmarks.planner_float8 import TORCHAO, planned_speed
from benchmarks.planner_rows import read_runs
from pretrain.common.config_loader import ConfigError
from pretrain.planner.estimate import Planner
from pretrain.planner.hardware import load_hardware
from pretrain.planner.planned_run import load_planned
from pretrain.planner.uncertainty import FLOAT8, uncertainty

VOCAB = 32_000


def planner(precision, *overrides, hardware="h100"):
    config = load_planned("1b/transformer", [f"train.precision={precision}", *overrides])
    return Planner(config, VOCAB, load_hardware(hardware))


def seconds(planner, kind, unit="attn"):
    """Of a block's forward and backward pass, in kernels of one kind."""
    units = planner.units(planner.config.parallel, "none")
    found = []
    for cost in (units.blocks[unit].forward, units.blocks[unit].backward):
        table = cost.table()
        each = table.times * planner.hardware.kernel_seconds(table, planner.software)
        found.append(float(each[table.is_kind(kind)].sum()))
    return found


def test_products_take_half_the_time_and_casts_more():
    bf16, fp8 = planner("bf16"), planner("fp8")
    for before, after in zip(seconds(bf16, "product"), seconds(fp8, "product"), strict=True):
        assert 0.45 < after / before < 0.6
    for before, after in zip(
        seconds(bf16, "elementwise"), seconds(fp8, "elementwise"), strict=True
    ):
        assert after > 1.5 * before
    assert seconds(fp8, "attention") == pytest.approx(seconds(bf16, "attention"))
    passes = [p.units(p.config.parallel, "none").blocks["attn"] for p in (bf16, fp8)]
    for which in ("forward", "backward"):
        assert getattr(passes[0], which).flops == getattr(passes[1], which).flops
    # The scales alone are kept beside what bf16 keeps.
    assert passes[0].forward.kept <= passes[1].forward.kept < passes[0].forward.kept + 1000


def test_a_plan_has_fewer_seconds():
    bf16, fp8 = (planner(p, "parallel.micro_batch_size=4") for p in ("bf16", "fp8"))
    one, other = (p.estimate(p.config.parallel, 8, "none") for p in (bf16, fp8))
    assert 0.5 * one.seconds["compute"] < other.seconds["compute"] < one.seconds["compute"]
    assert other.peak_flops == 1979e12


def test_the_range_is_that_of_published_runs():
    runs = [run for run in read_runs(precision="fp8")[0] if run.source in TORCHAO]
    factor, number = FLOAT8
    assert len(runs) == number
    ratios = [planned_speed(run, "fp8") / run.tokens_per_second for run in runs]
    assert factor / 1.05 < max(max(ratio, 1 / ratio) for ratio in ratios) < factor
    fp8 = planner("fp8")
    assert uncertainty(fp8.config, fp8.hardware).factor == factor
    hybrid = load_planned("1b/gdn-hybrid-3to1", ["train.precision=fp8"])
    sure = uncertainty(hybrid, fp8.hardware)
    assert sure.factor is None
    assert "other models in fp8" in sure.why


def test_tensor_parallel_processes_exchange_their_largest_elements():
    count = {}
    for precision in ("bf16", "fp8"):
        found = planner(precision, "parallel.tensor=2")
        block = found.units(found.config.parallel, "none").blocks["attn"]
        count[precision] = (block.forward.collectives, block.backward.collectives)
    # Of the seven weights and two sharded inputs; of the gradients of five outputs.
    assert count["fp8"] == (count["bf16"][0] + 7, count["bf16"][1] + 5)


@pytest.mark.parametrize("hardware", ["a100-80gb", "cpu"])
def test_hardware_without_float8_is_refused(hardware):
    with pytest.raises(
        ConfigError, match=r"peak_tflops has .'bf16', 'float32'., expected an .* fp8"
    ):
        load_hardware(hardware).peak_flops("fp8")
