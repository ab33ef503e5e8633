"""Takes statistics of a step under many layouts in one launch of four processes.

``python -m tests.helpers.blocks_worker FILE``, on four processes; see test_block_statistics.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config import ParallelConfig
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.nn.mixers import registry
from pretrain.parallel.processes import stop_processes
from pretrain.training.block_statistics import BlockStatistics
from pretrain.training.engine import Engine
from pretrain.training.metrics import LayerMetrics
from tests.helpers import parallel_worker
from tests.helpers.parallel_worker import settings, start, step_of
from tests.helpers.small_mixers import SMALL
from tests.helpers.small_model import VOCAB

ROWS = 8
SOFTMAXES = ("attn", "swa", "sliced_attn", "rat", "tcnca", "aaren", "lightnet")
parallel_worker.MODELS["watched"] = settings("gdn attn mamba2 para_gru", tie_embeddings=False)
parallel_worker.MODELS["softmaxes"] = settings(
    " ".join(SOFTMAXES),
    mixers={name: SMALL[name][-1 if name == "rat" else 0] for name in SOFTMAXES},
)
CELLS = ("lstm", "gru", "slstm", "para_gru", "para_lstm", "s4", "s4d", "plstm")
parallel_worker.MODELS["cells"] = settings(" ".join(CELLS))
OTHERS = [name for name in registry() if name not in (*SOFTMAXES, *CELLS, "gdn", "mamba2")]
parallel_worker.MODELS["others"] = settings(" ".join(OTHERS))
LAYOUTS = {
    "tp2-pp2-sequence": ParallelConfig(tensor=2, pipeline=2, sequence=True),
    "tp2-dp2": ParallelConfig(tensor=2),
    "pp2-vpp2-dp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "dp4-zero0": ParallelConfig(zero_stage=0),
    "dp4": ParallelConfig(),
    "cp2-dp2": ParallelConfig(context=2),
    "cp2-tp2-sequence": ParallelConfig(context=2, tensor=2, sequence=True),
    "deepspeed-dp4-zero0": ParallelConfig(zero_backend="deepspeed", zero_stage=0),
    "deepspeed-tp2-dp2-zero1": ParallelConfig(zero_backend="deepspeed", tensor=2),
    "deepspeed-dp4-zero2": ParallelConfig(zero_backend="deepspeed", zero_stage=2),
    "deepspeed-dp4-zero2-offload": ParallelConfig(
        zero_backend="deepspeed", zero_stage=2, offload="cpu"
    ),
    "deepspeed-dp4-zero3": ParallelConfig(zero_backend="deepspeed", zero_stage=3),
}
CASES = {name: ("watched", layout) for name, layout in LAYOUTS.items()}
CASES |= {
    "experts-ep2-dp4": ("experts", ParallelConfig(expert=2)),
    "experts-tp2-sequence-dp2": ("experts", ParallelConfig(tensor=2, sequence=True)),
}
# Whose gates and logits are found inside ops, which other ranks take part in.
for model in ("softmaxes", "cells"):
    CASES[f"{model}-cp2-tp2-sequence"] = model, LAYOUTS["cp2-tp2-sequence"]
    CASES[f"{model}-cp4"] = model, ParallelConfig(context=4)
CASES["cells-cp2-dp2"] = "cells", LAYOUTS["cp2-dp2"]  # a head for each rank
CASES["softmaxes-tp2-pp2-sequence"] = "softmaxes", LAYOUTS["tp2-pp2-sequence"]
CASES["others-cp2-tp2-sequence"] = "others", LAYOUTS["cp2-tp2-sequence"]
CASES["experts-pp2-cp2"] = "experts", ParallelConfig(pipeline=2, context=2)
CASES["experts-dp4-zero0"] = "experts", LAYOUTS["dp4-zero0"]
# In which training is compared with that of nobody watching.
COMPARED = (
    "tp2-pp2-sequence",
    "deepspeed-dp4-zero3",
    "softmaxes-cp4",
    "cells-cp4",
    "experts-pp2-cp2",
)


def model_of(pattern: str, checkpointing: str = "none", **changes: Any) -> LanguageModel:
    """Return a whole model."""
    config = settings(pattern, **changes)
    return build_model(config, VOCAB, seed=0, activation_checkpointing=checkpointing)


def engine_of(pattern: str, checkpointing: str = "none", **changes: Any) -> Engine:
    """Return the engine of one process."""
    model = model_of(pattern, checkpointing, **changes)
    return Engine(model, parallel_worker.OPTIMIZER, ParallelConfig())


def watch(model: str, parallel: ParallelConfig) -> dict[str, Any]:
    """Return what is found in the first step, and what that step and the next one come to."""
    engine = parallel_worker.make(model, parallel)
    statistics = BlockStatistics(engine, LayerMetrics())
    statistics.open()
    first = step_of(engine, 0, ROWS)
    statistics.close()
    rows = statistics.rows()
    return {"rows": rows, "steps": [first, step_of(engine, 1, ROWS)]}


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name, (model, parallel) in CASES.items():
        start(parallel)
        found[name] = watch(model, parallel)
        if name in COMPARED:
            engine = parallel_worker.make(model, parallel)
            found[name]["without"] = [step_of(engine, step, ROWS) for step in range(2)]
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    stop_processes()


if __name__ == "__main__":
    main()
