"""Builds large models as one process of many, one after another, and prints what it found as JSON.

``python -m tests.helpers.shard_worker build_seven_billion`` or ``compare_parts``, see
test_shard_by_shard.py.
"""

from __future__ import annotations

import json
import resource
import sys

import torch
import yaml

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, ParallelConfig
from pretrain.model.build import build_stages
from pretrain.model.counts import count_model
from pretrain.nn.parameters import info_of
from tests.helpers.fake_processes import as_process
from tests.helpers.processes import ROOT

SEVEN_BILLION = ROOT / "configs/models/7b/gdn-hybrid-3to1.yaml"


def build_seven_billion():
    settings = yaml.safe_load(SEVEN_BILLION.read_text())["model"]
    config = build_config(ModelConfig, settings, "test")
    assert config.vocab_size is not None
    layout = ParallelConfig(tensor=8, pipeline=4)
    total, most = 0, 0
    for rank in range(32):
        with as_process(rank, 32, layout):
            (stage,) = build_stages(config, config.vocab_size, seed=0, seq_len=4096)
            own = 0
            for parameter in stage.parameters():
                assert parameter.device.type == "cpu"
                own += parameter.numel()
                if info_of(parameter).shard is not None or rank % 8 == 0:
                    total += parameter.numel()
            most = max(most, own)
    print(
        json.dumps(
            {
                "total": total,
                "most": most,
                "expected": count_model(config, config.vocab_size, 4096).parameters,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


WIDE = {"hidden_size": 1024, "pattern": "attn", "mlp": {"intermediate_size": 3072}}


def compare_parts():
    config = build_config(ModelConfig, WIDE, "test")

    def built(rank, size):
        with as_process(rank, size, ParallelConfig(tensor=size)):
            (stage,) = build_stages(config, 6144, seed=3, seq_len=64)
            shards = {n: info_of(p).shard for n, p in stage.named_parameters()}
            axes = {n: shard.axis for n, shard in shards.items() if shard is not None}
            return {n: p.detach() for n, p in stage.named_parameters()}, axes

    (whole, _), (_, axes) = built(0, 1), built(0, 2)
    differ = []
    for size in (2, 8):
        parts = [built(rank, size)[0] for rank in range(size)]
        for name, full in whole.items():
            own = [part[name] for part in parts]
            together = torch.cat(own, axes[name]) if name in axes else own[0]
            if not torch.equal(together, full):
                differ.append(f"{name} of {size}")
    large = [n for n, p in whole.items() if p.numel() > 2**20]
    spread = max(
        abs(whole[n].std().item() / 0.02 - 1)
        for n in large
        if "o_proj" not in n and "down" not in n
    )
    distinct = len({whole[n].flatten()[0].item() for n in large}) == len(large)
    print(
        json.dumps({"differ": differ, "large": len(large), "spread": spread, "distinct": distinct})
    )


if __name__ == "__main__":
    {"build_seven_billion": build_seven_billion, "compare_parts": compare_parts}[sys.argv[1]]()
