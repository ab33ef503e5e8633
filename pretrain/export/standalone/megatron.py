"""What our layers use of megatron-core, for one process: stands for all its modules at once."""

from __future__ import annotations

import enum
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

parallel_state: Any = sys.modules[__name__]
tensor_parallel: Any = sys.modules[__name__]


class TransformerConfig(SimpleNamespace):
    pass


class ModelType(enum.Enum):
    encoder_or_decoder = 1


class _Linear(nn.Module):
    def __init__(self, d_in: int, d_out: int, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight), None


class ColumnParallelLinear(_Linear):
    pass


class RowParallelLinear(_Linear):
    pass


class VocabParallelEmbedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens]


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    ).view_as(targets)


def set_tensor_model_parallel_attributes(*_: Any) -> None:
    pass


def _unchanged(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


copy_to_tensor_model_parallel_region = _unchanged
reduce_from_tensor_model_parallel_region = _unchanged
gather_from_tensor_model_parallel_region = _unchanged
gather_from_sequence_parallel_region = _unchanged
reduce_scatter_to_sequence_parallel_region = _unchanged


def make_viewless_tensor(x: Tensor, **_: Any) -> Tensor:
    return x


def get_tensor_model_parallel_group() -> None:
    return None


def get_tensor_model_parallel_rank() -> int:
    return 0


def get_tensor_model_parallel_world_size() -> int:
    return 1


def get_pipeline_model_parallel_world_size() -> int:
    return 1


def get_virtual_pipeline_model_parallel_world_size() -> None:
    return None
