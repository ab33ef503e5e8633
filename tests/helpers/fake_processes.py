"""Being one process of many without the others: for shapes and counts, not for values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.config import ParallelConfig
from pretrain.config.checks import check_world_size
from pretrain.parallel.processes import stop_processes


@contextmanager
def as_process(rank: int, size: int, config: ParallelConfig) -> Iterator[None]:
    """Inside, this is process ``rank`` of ``size`` under a layout, in groups whose collectives do
    nothing. Must not be called where process groups exist. Raises UserError where the processes do
    not divide into copies of the model."""
    check_world_size(config, size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        parts = config.virtual_pipeline
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            virtual_pipeline_model_parallel_size=parts if parts > 1 else None,
            expert_model_parallel_size=config.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        stop_processes()
