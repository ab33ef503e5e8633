"""The choice of the projections that multiply in float8, which is the same under every layout.

They are the linear layers of blocks whose two widths in the full model are multiples of 16, which
float8 products on a GPU need; not those that decide on decays and other gates, what all heads of a
layer share, routers and experts, low-rank differences, embedding and head.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from pretrain.common.config_loader import ConfigError
from pretrain.config import ModelConfig
from pretrain.model.block import Block
from pretrain.model.spec import block_specs
from pretrain.nn.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from pretrain.nn.mixers import LayerContext
from pretrain.ops.float8 import Float8
from pretrain.parallel.context import ParallelContext

MULTIPLE = 16
Projection = ColumnParallelLinear | RowParallelLinear


def multiply_in_float8(model: nn.Module, context: ParallelContext) -> None:
    """Let the projections of a model, or of a stage of it, multiply in float8."""
    for _, layer in _chosen(model):
        row = isinstance(layer, RowParallelLinear)
        layer.float8 = Float8("inputs" if row else "outputs", context.group)


def count_projections(config: ModelConfig) -> tuple[int, int]:
    """Return how many projections of a model's blocks multiply in float8, and how many there are.

    A block in a loop counts once.
    """
    times = Counter(spec.kind for spec in block_specs(config))
    chosen = every = 0
    for kind, block in _blocks(config):
        chosen += times[kind] * len(list(_chosen(block)))
        linear = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)
        every += times[kind] * sum(isinstance(module, linear) for module in block.modules())
    return chosen, every


def check_float8_layout(config: ModelConfig, tensor: int, where: str) -> None:
    """Raise ConfigError unless each of ``tensor`` processes has whole multiples of 16 channels.

    Leaving what does not fit in bf16 would train another model than one process does.
    """
    for kind, block in _blocks(config):
        for name, layer in _chosen(block):
            row = isinstance(layer, RowParallelLinear)
            count, what = (layer.d_in, "inputs") if row else (layer.d_out, "outputs")
            if count % (MULTIPLE * tensor):
                raise ConfigError(
                    f"{where}: train.precision is fp8 and parallel.tensor {tensor}, which leaves "
                    f"{count} / {tensor} {what} of {name} ({kind}) to a process; expected a "
                    f"multiple of {MULTIPLE}, or bf16"
                )


def _blocks(config: ModelConfig) -> Iterator[tuple[str, Block]]:
    """Yield an unsharded block of each kind, without memory."""
    context = LayerContext(config.hidden_size, 0.0, 0.0, ParallelContext())
    for kind, spec in {spec.kind: spec for spec in block_specs(config)}.items():
        with torch.device("meta"):
            yield kind, Block(spec, config, dataclasses.replace(context, number=spec.number))


def _chosen(model: nn.Module) -> Iterator[tuple[str, Projection]]:
    for name, layer in model.named_modules():
        if not isinstance(layer, Projection) or layer.precise:
            continue
        if layer.d_in % MULTIPLE == 0 and layer.d_out % MULTIPLE == 0:
            yield name, layer
