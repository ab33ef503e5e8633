"""The part of a layout that the layers of a model depend on."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

CellsOverSegments = Literal["heads", "chain"]


@dataclass(frozen=True)
class ParallelContext:
    """This rank's part of a layout, for the layers that are built.

    The default is a full model on one process, for which no process group exists. Layers ask it for
    their shards; they look at no global state.

    Attributes:
        dtype: of weights and activations.
        tensor_size: number of tensor-parallel ranks.
        tensor_rank: this process's number among them.
        group: of the tensor-parallel ranks; None where there is one.
        sequence_parallel: whether they also shard the tokens outside the layers.
        context_size: number of context-parallel ranks, of which each trains on a segment of a row.
        context_rank: this process's number among them.
        context_group: of them; None where there is one.
        context_cells: whether they compute sequential cells with some of the heads each, where
            there are enough, or one after another.
        expert_size: number of ranks that shard experts.
        expert_rank: this process's number among them.
        home: device that weights and states are made on, None for torch's default device.
        width: of the layers that are made, as a multiple of the width that initialisation and
            learning rate were chosen at (maximal-update parametrization); 1 without it.
    """

    dtype: torch.dtype = torch.float32
    tensor_size: int = 1
    tensor_rank: int = 0
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    context_size: int = 1
    context_rank: int = 0
    context_group: dist.ProcessGroup | None = None
    context_cells: CellsOverSegments = "chain"
    expert_size: int = 1
    expert_rank: int = 0
    home: torch.device | None = None
    width: float = 1.0

    @property
    def device(self) -> torch.device:
        """Return the device of new tensors: torch's default one if it was set, else ``home``."""
        default = torch.get_default_device()
        return default if default.type != "cpu" or self.home is None else self.home

    def local(self, count: int, what: str) -> int:
        """Return this rank's number of ``count`` heads or channels; ValueError if it is uneven."""
        if count % self.tensor_size:
            raise ValueError(
                f"{what} is {count}, which tensor parallel size {self.tensor_size} does not divide"
            )
        return count // self.tensor_size

    def cells_over_heads(self, heads: int) -> bool:
        """Return whether context-parallel ranks share a sequential cell by its ``heads`` here."""
        return self.context_cells == "heads" and heads >= self.context_size

    def with_width(self, width: float) -> ParallelContext:
        """Return the context of layers that are ``width`` times as wide as the base model."""
        return dataclasses.replace(self, width=width)


def current_context(
    dtype: torch.dtype = torch.float32,
    *,
    sequence_parallel: bool = False,
    context_cells: CellsOverSegments = "chain",
) -> ParallelContext:
    """Return the context of this process: of the layout whose groups exist, else of one process.

    Starts nothing. Weights are made on this process's device (see :func:`local_device`).
    """
    from pretrain.parallel.processes import local_device

    home = local_device()
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return ParallelContext(dtype, home=home)
    size = state.get_tensor_model_parallel_world_size()
    segments = state.get_context_parallel_world_size()
    return ParallelContext(
        dtype,
        tensor_size=size,
        tensor_rank=state.get_tensor_model_parallel_rank(),
        group=state.get_tensor_model_parallel_group() if size > 1 else None,
        sequence_parallel=sequence_parallel and size > 1,
        context_size=segments,
        context_rank=state.get_context_parallel_rank(),
        context_group=state.get_context_parallel_group() if segments > 1 else None,
        context_cells=context_cells,
        expert_size=state.get_expert_model_parallel_world_size(),
        expert_rank=state.get_expert_model_parallel_rank(),
        home=home,
    )
