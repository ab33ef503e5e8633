"""The planner's figures of the cases on the standard input, as JSON: {name: keyword arguments}.

Planning plays one process of many, which needs an interpreter without process groups.
"""

from __future__ import annotations

import json
import sys

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.planner.estimate import Planner
from pretrain.planner.hardware import load_hardware
from tests.helpers.memory_worker import VOCAB
from tests.helpers.processes import ROOT


def run_config(settings):
    train = TrainConfig(
        steps=1,
        seq_len=settings["seq_len"],
        precision=settings["precision"],
        global_batch_tokens=settings["rows"] * settings["seq_len"],
        activation_checkpointing=settings["checkpointing"],
        segment_tokens=settings.get("segment_tokens"),
        carry_state=settings.get("carry_state", False),
        freeze=settings.get("freeze", []),
    )
    optimizer = OptimizerConfig(kind=settings.get("optimizer", "adamw"))
    model = build_config(ModelConfig, settings["model"], "case")
    return RunConfig("test", model, train=train, optimizer=optimizer)


def figures(settings, devices, hardware="cpu"):
    """What the planner says of a case."""

    planner = Planner(
        run_config(settings), VOCAB, load_hardware(ROOT / f"configs/hardware/{hardware}.yaml")
    )
    parallel = ParallelConfig(**settings["parallel"])
    estimate = planner.estimate(parallel, devices)
    units = planner.units(parallel, settings["checkpointing"])
    return {
        "memory": [stage.peak for stage in estimate.stages],
        "sent": estimate.sent,
        "seconds": estimate.seconds,
        "model_flops": estimate.model_flops,
        "hardware_flops": estimate.hardware_flops,
        "forward": {name: unit.forward.flops for name, unit in units.blocks.items()},
        "backward": {name: unit.backward.flops for name, unit in units.blocks.items()},
        "parameters": {n: sum(u.parameters.values()) for n, u in units.blocks.items()},
    }


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    print("planned", json.dumps({name: figures(**case) for name, case in cases.items()}))
