"""What the blocks of one kind share across depth, owned by the model.

A kind is a name in the pattern. Tables (:meth:`.Mixer.shared_tables`) are parameters of the model
with a row for each block of the kind, the blocks counted from the first of it. Every stage of a
pipeline that has such a block keeps the whole table; gradients are summed over stages, and the
first of them counts in norms and is written to checkpoints.

First values (:meth:`.Mixer.first_values`) are what the first block of a kind hands to the later
ones, of each token. They go along with the activations from block to block, and from stage to stage
of a pipeline beside them in one tensor. A loop whose first block of a kind lies in it makes them
anew in every pass; what follows the loop takes those of the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model.spec import block_specs
from pretrain.nn.parameters import change_info
from pretrain.nn.shared_tables import SharedTable
from pretrain.parallel.context import ParallelContext

if TYPE_CHECKING:
    from pretrain.model.language_model import LanguageModel


class TableSpec(NamedTuple):
    """A table: for which kind, its name there, the blocks that have a row, and its width."""

    kind: str
    name: str
    blocks: tuple[int, ...]
    width: int

    @property
    def parameters(self) -> int:
        """Return its number of elements."""
        return len(self.blocks) * self.width


def shared_tables(config: ModelConfig) -> list[TableSpec]:
    """Return the tables that the blocks of a model share."""
    specs = block_specs(config)
    found = []
    for kind in dict.fromkeys(spec.name for spec in specs):
        blocks = tuple(index for index, spec in enumerate(specs) if spec.name == kind)
        first = specs[blocks[0]]
        widths = first.mixer.shared_tables(first.config, config.hidden_size)
        found += [TableSpec(kind, name, blocks, width) for name, width in widths.items()]
    return found


def make_tables(config: ModelConfig, local: range, context: ParallelContext) -> nn.ModuleDict:
    """Make the tables that some of the ``local`` blocks read, by kind and name."""
    tables = nn.ModuleDict()
    for spec in shared_tables(config):
        here = [block in local for block in spec.blocks]
        if not any(here):
            continue
        table = SharedTable(context, len(spec.blocks), spec.width, spec.name)
        if not all(here):
            change_info(table.weight, tied=True, copy=not here[0])
        if spec.kind not in tables:
            tables[spec.kind] = nn.ModuleDict()
        tables[spec.kind].add_module(spec.name, table)
    return tables


class FirstValuesOnTheWay:
    """What the stages of a pipeline send each other beside activations: all first values.

    Every border of stages has room for those of every kind with more than one block.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext):
        self._width, self._context = config.hidden_size, context
        self._widths: dict[tuple[str, str], int] = {}  # of this tensor-parallel rank
        for spec in block_specs(config):
            if spec.later:
                widths = spec.mixer.first_values(spec.config, config.hidden_size)
                for name, width in widths.items():
                    self._widths[spec.name, name] = context.local(width, name)

    @property
    def width(self) -> int:
        """Return how much wider they make a token's activations, as far as this rank has them."""
        return self._times * sum(self._widths.values())

    @property
    def _times(self) -> int:
        """Return how many tokens a rank has of the values for each that it has of activations."""
        return self._context.tensor_size if self._context.sequence_parallel else 1

    def pack(self, x: Tensor, firsts: dict[str, dict[str, Tensor]]) -> Tensor:
        """Return x ``[T, B, d]`` with the first values beside it; zeros for what is not made yet.

        Under sequence parallelism those have all tokens, and some channels: the memory of several
        tokens' is put beside one of x, whichever they are.
        """
        parts = [x]
        for (kind, name), width in self._widths.items():
            shape = *x.shape[:2], self._times * width
            value = firsts.get(kind, {}).get(name)
            parts.append(x.new_zeros(shape) if value is None else value.reshape(shape).to(x.dtype))
        return torch.cat(parts, -1) if self._widths else x

    def unpack(self, received: Tensor) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """Return x and the first values that :meth:`pack` was given."""
        if not self._widths:
            return received, {}
        widths = [self._times * width for width in self._widths.values()]
        x, *values = received.split([self._width, *widths], -1)
        firsts: dict[str, dict[str, Tensor]] = {}
        for ((kind, name), width), value in zip(self._widths.items(), values, strict=True):
            whole = value.reshape(-1, received.shape[1], width)
            firsts.setdefault(kind, {})[name] = whole
        return x.contiguous(), firsts


def sum_tables(parts: Sequence[LanguageModel], gradient: Callable[[nn.Parameter], Tensor]) -> None:
    """Sum the tables' gradients over all stages that have them, in place.

    ``parts`` are the stages of this process; every process of the pipeline must call.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return
    config, context = parts[0].model_config, parts[0].context
    for spec in shared_tables(config):
        path = f"tables.{spec.kind}.{spec.name}.weight"
        found = [dict(part.named_parameters()).get(path) for part in parts]
        learning = [weight for weight in found if weight is not None and weight.requires_grad]
        gradients = [gradient(weight) for weight in learning]
        shape = len(spec.blocks), context.local(spec.width, spec.name)
        dtype = torch.promote_types(context.dtype, torch.float32)
        total = torch.zeros(shape, dtype=dtype, device=context.home)
        for each in gradients:
            total += each
        dist.all_reduce(total, group=group)
        for each in gradients:
            each.copy_(total)
