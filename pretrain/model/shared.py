"""What the blocks of one kind share across depth, owned by the model.

A kind is a name in the pattern. Tables (:meth:`.Mixer.shared_tables`) are parameters of the model
with a row for each block of the kind, the blocks counted from the first of it. Every stage of a
pipeline that has such a block keeps the whole table; gradients are summed over stages, and the
first of them counts in norms and is written to checkpoints.
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
        gradients = [gradient(weight) for weight in found if weight is not None]
        shape = len(spec.blocks), context.local(spec.width, spec.name)
        dtype = torch.promote_types(context.dtype, torch.float32)
        total = torch.zeros(shape, dtype=dtype, device=context.home)
        for each in gradients:
            total += each
        dist.all_reduce(total, group=group)
        for each in gradients:
            each.copy_(total)
