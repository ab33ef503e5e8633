"""Large models are made in the parts that processes hold, and the parts make up the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, ParallelConfig

ROOT = Path(__file__).parents[3]
SEVEN_BILLION = ROOT / "configs/models/7b/gdn-hybrid-3to1.yaml"
MEMORY = 24e9  # bytes, of the machine


def run(code):
    """In an interpreter of its own, which then is one process of many, one after another."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            f"from tests.pretrain.parallel import {Path(__file__).stem} as test; test.{code}",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))


def build_seven_billion():
    import resource

    from pretrain.model.build import build_stages
    from pretrain.model.counts import count_model
    from tests.helpers.fake_processes import as_process

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
                if getattr(parameter, "tensor_model_parallel", False) or rank % 8 == 0:
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


@pytest.mark.slow
def test_seven_billion_parameters_are_built_process_by_process():
    found = run("build_seven_billion()")
    assert found["total"] == found["expected"] > 6.8e9
    assert found["most"] < 0.05 * found["expected"]
    assert found["peak"] < MEMORY / 4


WIDE = {"hidden_size": 1024, "pattern": "attn", "mlp": {"intermediate_size": 3072}}


def compare_parts():
    import torch

    from pretrain.model.build import build_stages
    from tests.helpers.fake_processes import as_process

    config = build_config(ModelConfig, WIDE, "test")

    def built(rank, size):
        with as_process(rank, size, ParallelConfig(tensor=size)):
            (stage,) = build_stages(config, 6144, seed=3, seq_len=64)
            axes = {
                n: getattr(p, "partition_dim", None)
                for n, p in stage.named_parameters()
                if getattr(p, "tensor_model_parallel", False)
            }
            return {n: p.detach() for n, p in stage.named_parameters()}, axes

    whole, axes = built(0, 1)
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


def test_large_parameters_are_alike_however_they_are_divided():
    found = run("compare_parts()")
    assert found["differ"] == []
    assert found["large"] >= 4 and found["distinct"]
    assert found["spread"] < 0.01
