"""Layers in float8 on two tensor-parallel processes; see test_float8_layouts.py.

``torchrun --nproc-per-node 2 -m tests.helpers.float8_worker FILE``
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, ParallelConfig
from pretrain.model.build import build_model
from pretrain.model.float8 import multiply_in_float8
from pretrain.nn.linear import column_input, column_linear, row_linear
from pretrain.nn.parameters import fill_parameters, info_of
from pretrain.parallel.collectives import gather_sequence
from pretrain.parallel.context import current_context
from pretrain.parallel.processes import (
    gather,
    is_main_process,
    start_processes,
    stop_processes,
)

VOCAB, TOKENS, D = 64, 64, 64
MIXERS = {
    "attn": {"num_heads": 4, "num_kv_heads": 2},
    "gdn": {"num_heads": 2, "head_dim": 32, "chunk_size": 16},
    "m2rnn": {"num_heads": 4, "head_dim": 16, "value_dim": 16},
    "hgrn2": {"head_dim": 16, "chunk_size": 16},
}


class Columns(nn.Module):
    """Two projections of one input, whose outputs are sharded."""

    def __init__(self, context, shared):
        super().__init__()
        self.first, self.second = (column_linear(context, D, n, 0.5) for n in (96, 32))
        self._context, self._shared = context, shared

    def forward(self, x):
        x = column_input(x, self._context, self if self._shared else None)
        return torch.cat([self.first(x), self.second(x)], -1)


class Row(nn.Module):
    """A projection whose inputs are sharded, of which it takes this process's."""

    def __init__(self, context):
        super().__init__()
        self.only, self._context = row_linear(context, D, 96, 0.5), context

    def forward(self, x):
        return self.only(x.chunk(self._context.tensor_size, -1)[self._context.tensor_rank])


def sharded_layer(kind, sequence):
    """Output and gradients in full of one layer, given the same input and gradient anywhere."""
    context = current_context(torch.bfloat16, sequence_parallel=sequence)
    layer = Row(context) if kind == "row" else Columns(context, kind == "columns")
    fill_parameters(layer, seed=0)
    multiply_in_float8(layer, context)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, 1, D, generator=generator)
    # Each process's part has its own largest element.
    x = (x * torch.linspace(0.1, 3, D)).bfloat16()
    towards = torch.randn(TOKENS, 1, 128 if kind != "row" else 96, generator=generator)
    towards = (towards * torch.linspace(3, 0.1, towards.shape[-1])).bfloat16()
    size, rank = context.tensor_size, context.tensor_rank
    if kind == "row":
        mine, towards = x, towards.chunk(size)[rank] if sequence else towards
    else:
        mine = x.chunk(size)[rank] if sequence else x
        parts = [part.chunk(size, -1)[rank] for part in towards.split([96, 32], -1)]
        towards = torch.cat(parts, -1)
    mine.requires_grad_()
    y = layer(mine)
    y.backward(towards)
    assert mine.grad is not None
    found = {"y": y.detach(), "x": mine.grad}
    if kind == "row":
        found["x"] = sum(gather(mine.grad, context.group)) if size > 1 else mine.grad
        if sequence:
            found["y"] = gather_sequence(found["y"], context.group)
    else:
        if size > 1:
            outputs = gather(y.detach().split([96 // size, 32 // size], -1), context.group)
            found["y"] = torch.cat(
                [part for parts in zip(*outputs, strict=True) for part in parts], -1
            )
        if sequence:
            found["x"] = gather_sequence(found["x"], context.group)
    for name, parameter in layer.named_parameters():
        shard = info_of(parameter).shard
        assert shard is not None
        parts = gather(parameter.grad, context.group) if size > 1 else [parameter.grad]
        found[name] = torch.cat(parts, shard.axis)
    return found


def block(pattern, sequence, checkpointing):
    """Output of a block and the gradients of its input and parameters, of this process."""
    context = current_context(torch.bfloat16, sequence_parallel=sequence)
    values = {"hidden_size": D, "pattern": pattern, "mixers": {pattern: MIXERS[pattern]}}
    config = build_config(ModelConfig, {**values, "init_std": 0.2}, "test")
    model = build_model(
        config, VOCAB, seed=0, context=context, activation_checkpointing=checkpointing
    )
    multiply_in_float8(model, context)
    x, towards = torch.randn(2, TOKENS, 1, D, generator=torch.Generator().manual_seed(3)).bfloat16()
    if sequence:
        x, towards = (t.chunk(context.tensor_size)[context.tensor_rank] for t in (x, towards))
    x.requires_grad_()
    y = model.run_blocks(x, range(1), None)
    y.backward(towards)
    return [y.detach(), x.grad, *(p.grad for p in model.blocks.parameters())]


LAYERS = {
    f"{kind}{'-sequence' * sequence}": (kind, sequence)
    for kind in ("columns", "columns-apart", "row")
    for sequence in (False, True)
}


def main(path):
    start_processes(ParallelConfig(tensor=2))
    found = {name: sharded_layer(*case) for name, case in LAYERS.items()}
    for pattern in MIXERS:
        for sequence in (False, True):
            found[f"{pattern}{'-sequence' * sequence}"] = {
                kind: block(pattern, sequence, kind) for kind in ("none", "block", "selective")
            }
    if is_main_process():
        torch.save(found, path)
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
