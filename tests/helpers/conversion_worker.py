"""Starts converted models under several layouts of two processes, from a run's weights.

``torchrun --nproc-per-node 2 -m tests.helpers.conversion_worker RUN FILE``, see
test_conversion.py.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from pretrain.checkpoint.state import read_state
from pretrain.config import InitializeConfig, ModelConfig, ParallelConfig, RecursionConfig
from pretrain.model.build import build_stages
from pretrain.model.spec import converted_settings
from pretrain.nn.parameters import info_of
from pretrain.parallel.processes import gather, is_main_process, stop_processes
from pretrain.run_directory import find_checkpoint
from pretrain.training.initialization import initialize_from
from tests.helpers.parallel_worker import start

CONVERTED = ("gdn", "mamba2", "kda", "delta_product", "hgrn2")
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "pp2": ParallelConfig(pipeline=2),
}
CASES = (*CONVERTED, "loop")


def converted_model(case: str, source: ModelConfig) -> ModelConfig:
    """Return the settings of a model that a run of four attention layers becomes."""
    mixer = "gdn" if case == "loop" else case
    mixers = {**source.mixers, mixer: converted_settings(mixer, {}, source)}
    model = dataclasses.replace(source, pattern=f"{mixer} attn {mixer} attn", mixers=mixers)
    if case != "loop":
        return model
    loop = RecursionConfig(times=2, lora_rank=3)
    return dataclasses.replace(model, pattern=f"2*{mixer}", recursion=loop)


def started(case: str, run: str) -> dict[str, tuple[torch.Tensor, int | None]]:
    """Return the starting weights of this process, and the axis along which each is sharded."""
    state = read_state(find_checkpoint(Path(run)))
    model = converted_model(case, state.model_config)
    stages = build_stages(model, state.vocab_size, seed=1, seq_len=32)
    mixer = "gdn" if case == "loop" else case
    initialize_from(stages, InitializeConfig(run, convert={mixer: "qkvo"}, method="average"))
    found = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            shard = info_of(parameter).shard
            found[name] = parameter.detach().clone(), None if shard is None else shard.axis
    return found


def main(run: str, path: Path) -> None:
    """Write what every process has under each layout."""
    found = {}
    for name, parallel in LAYOUTS.items():
        start(parallel)
        found[name] = {case: gather(started(case, run)) for case in CASES}
    if is_main_process():
        torch.save(found, path)
    stop_processes()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
