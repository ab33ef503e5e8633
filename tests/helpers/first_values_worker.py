"""Trains layers that take values of the first one of their kind, on two processes.

With RWKV's channel mixing as the MLP, too.

``torchrun --nproc-per-node 2 -m tests.helpers.first_values_worker FILE``, see
test_first_values.py.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, ParallelConfig
from pretrain.model.build import build_stages
from pretrain.nn.linear import column_input, column_linear, row_linear
from pretrain.nn.mixers import Mixer, base
from pretrain.nn.mixers.base import MixerCard, MixerConfig, heads
from pretrain.nn.mixers.parts import gate_parameter, matrix_state
from pretrain.nn.parameters import constant
from pretrain.ops import linear_attention
from pretrain.parallel.processes import (
    data_parallel_rank_and_size,
    gather,
    is_main_process,
    stop_processes,
)
from pretrain.training.engine import Engine
from tests.helpers.channel_mixing import CHANNELS, with_output
from tests.helpers.parallel_worker import OPTIMIZER, SEQ_LEN, start
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import batches

HEADS = 4


class HandingConfig(MixerConfig):
    """No settings."""


class Handing(Mixer):
    """Leaky sums of values that later layers mix with those of the first layer."""

    config_class = HandingConfig
    card = MixerCard("handing", "s_t = s_{t-1} / 2 + v_t", "H D", "chunks", "a test")

    def __init__(self, config: Any, context: Any):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.num_heads, self.head_dim = parallel.local(HEADS, "heads"), d // HEADS
        self.v_proj = column_linear(parallel, d, d, context.std)
        self.o_proj = row_linear(parallel, d, d, context.output_std)
        self.later = context.number > 0
        if self.later:
            self.mix = gate_parameter(parallel, (parallel.local(d, "width"),), constant(0.5))

    def forward(self, x, *, sequences=None, state=None, first=None):
        x = column_input(x, self.parallel, self)
        v = torch.tanh(self.v_proj(x))
        if self.later:
            v = v + ((first["v"] - v) * torch.sigmoid(self.mix)).to(v.dtype)
        elif first is not None:
            first["v"] = v
        values = heads(v, self.num_heads)
        ones = torch.ones_like(values[..., :1])
        y, last = linear_attention(
            ones,
            ones,
            values,
            log_decay=ones[..., 0] * -0.7,
            scale=1.0,
            sequences=sequences,
            initial_state=None if state is None else state["sum"],
        )
        return self.o_proj(F.silu(y).flatten(2).transpose(0, 1)), {"sum": last}

    def init_state(self, batch_size):
        return {"sum": matrix_state(self.parallel, batch_size, self.num_heads, 1, self.head_dim)}

    @classmethod
    def sharded_counts(cls, config, hidden_size):
        return {"heads": HEADS}

    @classmethod
    def first_values(cls, config, hidden_size):
        return {"v": hidden_size}

    @classmethod
    def added_later(cls, config, hidden_size):
        return hidden_size, 0

    @classmethod
    def num_parameters(cls, config, hidden_size):
        return 2 * hidden_size**2

    @classmethod
    def flops_per_token(cls, config, hidden_size, seq_len):
        return 4 * hidden_size**2

    @classmethod
    def state_bytes(cls, config, hidden_size, seq_len):
        return 4 * hidden_size


def known() -> AbstractContextManager[Any]:
    """Let patterns name the layer while open; it is none of the package's."""
    return patch.dict(base._REGISTRY, handing=Handing)


def settings(pattern: str = "attn 3*handing", **changes: Any) -> ModelConfig:
    values = {
        "hidden_size": 24,
        "pattern": pattern,
        "mixers": {"attn": {"num_heads": 4}} if "attn" in pattern else {},
        "mlp": {"ratio": 2},
        **changes,
    }
    return build_config(ModelConfig, values, "test")


LOOPED: dict[str, Any] = {
    "pattern": "2*handing attn handing",
    "recursion": {"prelude": 1, "coda": 1, "times": 2},
}
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2-sequence": ParallelConfig(tensor=2, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "pp2-vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "cp2": ParallelConfig(context=2),
    "dp2": ParallelConfig(),
}
# megatron-core shards no optimizer of float64.
ALONE = ParallelConfig(zero_stage=0)
LAYOUTS = {name: replace(parallel, zero_stage=0) for name, parallel in LAYOUTS.items()}


def step(
    parallel: ParallelConfig, checkpointing: str = "none", **changes: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of a global batch in float64, summed, and this process's gradients.

    megatron-core sums them in float32.
    """
    with known():
        stages = build_stages(
            settings(**changes),
            VOCAB,
            seed=0,
            seq_len=SEQ_LEN,
            dtype=torch.float64,
            sequence_parallel=parallel.sequence,
            activation_checkpointing=checkpointing,
        )
        rank, size = data_parallel_rank_and_size()
        for stage in stages:
            with_output(stage)
        engine = Engine(stages, OPTIMIZER, parallel)
        engine.begin_step(0, 0, rank, size)
        rows = batches(0, rows=4, micro_batch_size=1)[rank::size]
        sums = engine.backend.forward_backward(rows)
        named: Any = [item for part in engine.parts for item in part.named_parameters()]
    return float(sums[0]), {name: p.main_grad.clone() for name, p in named}


def main(path: Path) -> None:
    found = {}
    for name, parallel in LAYOUTS.items():
        start(parallel)
        found[name] = gather(step(parallel))
        found[f"{name}-channels"] = gather(step(parallel, **CHANNELS))
        if name in ("tp2-sequence", "pp2"):
            found[f"{name}-block"] = gather(step(parallel, "block"))
            found[f"{name}-selective"] = gather(step(parallel, "selective"))
        if name == "pp2":
            found["pp2-loop"] = gather(step(parallel, **LOOPED))
    if is_main_process():
        torch.save(found, path)
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
