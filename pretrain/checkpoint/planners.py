"""How torch.distributed.checkpoint finds the tensors of a checkpoint in the boxes of a process."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex


class SavePlanner(DefaultSavePlanner):
    """Look tensors up among the parts of :class:`pretrain.checkpoint.sharded_state.Boxes`."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the part that a write item names."""
        return self.state_dict[index.fqn].parts[index.offset]


class LoadPlanner(DefaultLoadPlanner):
    """Look tensors up among the parts of :class:`pretrain.checkpoint.sharded_state.Boxes`."""

    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        """Keep the state as it is; the inherited one makes None of what is not a tensor."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the part that a read item fills."""
        return self.state_dict[index.fqn].parts[index.offset]
