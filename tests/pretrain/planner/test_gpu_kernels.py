"""The kernels that stand in plans for a GPU's, against what they compute and keep."""

import pytest
import torch

from pretrain.data.sequences import Sequences
from pretrain.ops import attention
from pretrain.planner.estimate import Planner
from pretrain.planner.hardware import load_hardware
from pretrain.planner.planned_run import load_planned
from pretrain.planner.simulation import Simulation
from pretrain.planner.software import Software


def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("lengths", [[9], [1, 4, 12], [5, 5]])
def test_attention_counts_the_pairs_that_are_seen(lengths, window):
    heads, width = 3, 16
    q, k, v = empty(1, sum(lengths), heads, width), *(empty(1, sum(lengths), 1, width),) * 2
    with Simulation("cuda", Software()) as simulation:
        simulation.exclude([q, k, v])
        sequences = Sequences.from_lengths(lengths)
        y, cost = simulation.measure(lambda: attention(q, k, v, window=window, sequences=sequences))
        _, back = simulation.measure(lambda: y.backward(torch.empty_like(y)))
    pairs = sum(min(t + 1, window or t + 1) for length in lengths for t in range(length))
    assert cost.flops == 4 * pairs * heads * width
    assert back.flops == 2.5 * cost.flops


@pytest.mark.parametrize(("model", "times"), [("410m/transformer", 2), ("7b/transformer", 3)])
def test_zero_3_gathers_again_what_does_not_stay(model, times):
    """DeepSpeed keeps a billion parameters gathered between the passes."""
    config = load_planned(model, ["parallel.zero_stage=3", "parallel.zero_backend=deepspeed"])
    assert config.model.vocab_size is not None
    planner = Planner(config, config.model.vocab_size, load_hardware("h100"))
    estimate = planner.estimate(config.parallel, 8)
    number = planner.counts.parameters
    gathers = times if times == 2 else 3 - 1e9 / number
    once = 2 * number * 7 / 8
    assert estimate.sent["data parallel"] == pytest.approx(estimate.micro_batches * gathers * once)
