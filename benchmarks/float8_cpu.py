"""Train every family in float32, bf16 and fp8 and compare their losses, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.float8_cpu [FAMILY ...]

The float8 products are torchao's emulation: the numbers of a GPU's, summed in float32. Weights,
data and their order are the same in all three. The difference between bf16 and float32 is there to
say how far rounding alone carries two runs apart. All widths are multiples of 16, so that every
projection that may be in float8 is.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

import numpy as np
import torch

from pretrain.common.config_loader import build_config
from pretrain.common.dtypes import DTYPES
from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.data.batches import pack_rows
from pretrain.model.build import build_model
from pretrain.model.float8 import count_projections, multiply_in_float8
from pretrain.parallel.processes import start_processes
from pretrain.training.engine import Engine

STEPS, WARM_UP, LAST = 300, 20, 50
VOCAB, SEQ_LEN, ROWS, LR = 64, 64, 4, 2e-3
MIXERS = {
    "attn": {"num_heads": 4},
    "gdn": {"num_heads": 2, "head_dim": 32, "chunk_size": 16},
    "hgrn2": {"head_dim": 16, "chunk_size": 16},
    "delta_product": {"num_heads": 2, "head_dim": 32, "chunk_size": 16},
    "m2rnn": {"num_heads": 8, "head_dim": 16, "value_dim": 16},
    "para_gru": {"num_heads": 4},
    "para_lstm": {"num_heads": 4},
    "mamba2": {"head_dim": 16, "state_size": 16, "chunk_size": 16},
    "rat": {"num_heads": 4, "chunk_size": 4},
}
LOOP = {"prelude": 1, "coda": 1, "times": 3, "sampling": "poisson", "backprop_last": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "transformer": {"pattern": "3*attn"},
    "gdn-hybrid": {"pattern": "2*gdn attn"},
    "hgrn2-hybrid": {"pattern": "2*hgrn2 attn"},
    "mamba2": {"pattern": "3*mamba2", "mlp": {"kind": "none"}},
    "delta-product": {"pattern": "2*delta_product"},
    "m2rnn-hybrid": {"pattern": "2*m2rnn attn"},
    "para-gru": {"pattern": "2*para_gru"},
    "para-lstm": {"pattern": "2*para_lstm"},
    "rat": {"pattern": "3*rat"},
    "recursive-relaxed": {"pattern": "2*attn", "recursion": {"times": 2, "lora_rank": 4}},
    "recurrent-depth": {
        "pattern": "3*attn",
        "block_norm": "sandwich",
        "scale_embeddings": True,
        "recursion": {**LOOP, "adapter": True, "state_init": "random", "normalize_state": True},
    },
}


def model_config(family: str) -> ModelConfig:
    """Return the settings of a family's small model."""
    values = {"hidden_size": 64, "init_std": 0.05, "mixers": MIXERS, **FAMILIES[family]}
    return build_config(ModelConfig, values, family)


def losses(family: str, precision: str, steps: int = STEPS) -> list[float]:
    """Return the loss of every step, in a text that is half predictable."""
    model = build_model(model_config(family), VOCAB, seed=1, dtype=DTYPES[precision])
    if precision == "fp8":
        multiply_in_float8(model, model.context)
    engine = Engine(model, OptimizerConfig(lr=LR))
    generator = np.random.default_rng(7)
    following, found = generator.permutation(VOCAB), []
    for step in range(steps):
        rows = generator.integers(0, VOCAB, (ROWS, SEQ_LEN + 1))
        for t in range(1, SEQ_LEN + 1):
            rows[:, t] = np.where(rows[:, t] < VOCAB // 2, following[rows[:, t - 1]], rows[:, t])
        engine.begin_step(0, step)
        batch = pack_rows(rows, eod_id=0)
        found.append(engine.train_step([batch], LR * min(1, (step + 1) / WARM_UP)).loss)
    return found


def main(families: list[str]) -> None:
    torch.set_num_threads(1)
    start_processes()
    version = sys.modules["torch"].__version__
    print(f"{platform.machine()}, 1 thread, torch {version}; {STEPS} steps of {ROWS * SEQ_LEN:,}")
    print(
        f"tokens. Nats per token, means of the last {LAST} steps, and of fp8 less bf16 also of all"
    )
    print(f"{'family':18}  in fp8   first  float32    bf16     fp8  bf16-f32  fp8-bf16  of all")
    for family in families or FAMILIES:
        curves = {name: np.array(losses(family, name)) for name in ("float32", "bf16", "fp8")}
        ends = {name: curve[-LAST:].mean() for name, curve in curves.items()}
        apart = curves["fp8"] - curves["bf16"]
        chosen, every = count_projections(model_config(family))
        print(
            f"{family:18} {chosen:3}/{every:3} {curves['fp8'][0]:7.4f}  {ends['float32']:.4f}  "
            f"{ends['bf16']:.4f}  {ends['fp8']:.4f}  {ends['bf16'] - ends['float32']:+.4f}   "
            f"{ends['fp8'] - ends['bf16']:+.4f} {apart.mean():+.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
