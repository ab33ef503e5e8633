"""Losses of 100 training steps of every family at a tiny size.

The recorded curves hold on any machine up to rounding. Bits differ between CPUs, so a change that
must not alter a single one is compared with a file from the same machine:

    OMP_NUM_THREADS=1 python -m tests.helpers.golden_curves --json > before.json
    OMP_NUM_THREADS=1 python -m tests.helpers.golden_curves --against before.json
    OMP_NUM_THREADS=1 python -m tests.helpers.golden_curves --record   # the curves of the tests
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.data.batches import pack_rows
from pretrain.model.build import build_model
from pretrain.parallel.processes import start_processes
from pretrain.training.engine import Engine

RECORD = Path(__file__).parent / "golden_curves.json"
STEPS, VOCAB, SEQ_LEN, ROWS = 100, 64, 48, 2
MIXERS = {
    "attn": {"num_heads": 2},
    "gdn": {"num_heads": 2, "head_dim": 12, "chunk_size": 16},
    "hgrn2": {"head_dim": 16, "chunk_size": 16},
    "delta_product": {"num_heads": 2, "head_dim": 16, "chunk_size": 16},
    "m2rnn": {"num_heads": 4, "head_dim": 8, "value_dim": 8},
    "para_gru": {"num_heads": 2},
    "para_lstm": {"num_heads": 2},
    "mamba2": {"head_dim": 16, "state_size": 16, "chunk_size": 16},
    "rat": {"num_heads": 2, "chunk_size": 4},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "transformer": {"pattern": "2*attn"},
    "gdn-hybrid": {"pattern": "2*gdn attn"},
    "hgrn2-hybrid": {"pattern": "2*hgrn2 attn"},
    "mamba2": {"pattern": "2*mamba2", "mlp": {"kind": "none"}},
    "delta-product": {"pattern": "2*delta_product"},
    "m2rnn-hybrid": {"pattern": "2*m2rnn attn"},
    "para-gru": {"pattern": "2*para_gru"},
    "para-lstm": {"pattern": "2*para_lstm"},
    "rat": {"pattern": "2*rat"},
    "recursive-relaxed": {"pattern": "2*attn", "recursion": {"times": 2, "lora_rank": 4}},
    "recurrent-depth": {
        "pattern": "3*attn",
        "block_norm": "sandwich",
        "scale_embeddings": True,
        "recursion": {
            "prelude": 1,
            "coda": 1,
            "times": 3,
            "sampling": "poisson",
            "backprop_last": 2,
            "adapter": True,
            "state_init": "random",
            "normalize_state": True,
        },
    },
}


def losses(family):
    """Of every step, in a text that is half predictable, in documents of several lengths."""
    # Larger than usual at the start: norms of next to nothing would magnify a rounding error.
    settings = {
        "hidden_size": 32,
        "init_std": 0.1,
        "depth_scaled_init": True,
        "mixers": MIXERS,
        **FAMILIES[family],
    }
    model = build_model(build_config(ModelConfig, settings, family), VOCAB, seed=1)
    engine = Engine(model, OptimizerConfig(lr=3e-3))
    generator = np.random.default_rng(7)
    following = generator.permutation(VOCAB)
    found = []
    for step in range(STEPS):
        rows = generator.integers(0, VOCAB, (ROWS, SEQ_LEN + 1))
        for t in range(1, SEQ_LEN + 1):
            rows[:, t] = np.where(rows[:, t] < VOCAB // 2, following[rows[:, t - 1]], rows[:, t])
        engine.begin_step(0, step)
        found.append(engine.train_step([pack_rows(rows, eod_id=0)], 3e-3).loss)
    return found


def main():
    torch.set_num_threads(1)
    start_processes()
    found = {family: losses(family) for family in FAMILIES}
    if "--record" in sys.argv:
        lines = [f'"{name}": {json.dumps(curve)}' for name, curve in found.items()]
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    if "--json" in sys.argv:
        # Once more, for whether one machine finds the same bits twice.
        again = next(iter(FAMILIES))
        print(json.dumps({**found, "again": {again: losses(again)}}))
        return
    path = Path(sys.argv[2]) if "--against" in sys.argv else RECORD
    recorded = json.loads(path.read_text())
    for family, curve in found.items():
        apart = max(abs(a / b - 1) for a, b in zip(curve, recorded[family], strict=True))
        same = "the same bits" if curve == recorded[family] else f"furthest {apart:.1e}"
        print(f"{family:20s} {curve[0]:.4f} to {curve[-1]:.4f}, {same}")


if __name__ == "__main__":
    main()
