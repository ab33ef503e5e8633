"""ZeRO-1 for rules that need whole matrices: each data-parallel rank updates some parameters.

megatron-core's distributed optimizer cuts the flattened parameters into equal ranges; its
layer-wise one deals out whole parameters, by their size, as Muon needs them. Gradients are
all-reduced, and every rank sends what it has updated to the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pretrain.optim.optimizer import GATHERED_AT_ONCE
from pretrain.parallel.cpu import importing_megatron

with importing_megatron():
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection


class LayerWiseOptimizer(LayerWiseDistributedOptimizer):
    """megatron-core's, with a gathering of parameters that every backend and dtype can do."""

    @torch.no_grad()
    def allgather_params(self) -> None:
        """Send the updated parameters to the ranks that did not update them.

        megatron-core gathers all ranks' at once, as tensors of different sizes and one dtype, which
        gloo does not take and a bf16 model with float32 gates does not have.
        """
        shares = (
            (self.dp_cp_params_list, self.pg_collection.dp_cp),
            (self.expt_dp_params_list, self.pg_collection.expt_dp),
        )
        for lists, group in shares:
            for rank, parameters in enumerate(lists or []):
                if parameters:
                    dist._broadcast_coalesced(
                        group, [p.data for p in parameters], GATHERED_AT_ONCE, rank
                    )


def layer_wise_optimizer(
    settings: MegatronOptimizerConfig, make: Callable[[MegatronOptimizerConfig], Any]
) -> LayerWiseOptimizer:
    """Return the optimizer that ``make`` makes of settings, its parameters dealt out to the ranks.

    float32 copies of bf16 weights are made afterwards, of a rank's own parameters alone.
    """
    whole = make(dataclasses.replace(settings, bf16=False))
    optimizers = whole.chained_optimizers
    for optimizer in optimizers:
        optimizer.config = settings
    dealt = LayerWiseOptimizer(
        optimizers, settings, ProcessGroupCollection.use_mpu_process_groups(["dp_cp", "expt_dp"])
    )
    for optimizer in dealt.chained_optimizers:
        # Every parameter's gradient counts once, on the rank that updates it.
        optimizer.grad_stats_parallel_group = dist.group.WORLD
    return dealt
