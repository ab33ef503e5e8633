"""The kernels that stand in plans for a GPU's, against what they compute and keep."""

import pytest
import torch

from pretrain.data.sequences import Sequences
from pretrain.ops import attention
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
