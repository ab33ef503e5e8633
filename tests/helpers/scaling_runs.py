"""Run directories that no run has made, for what reads curves."""

from __future__ import annotations

import json

import yaml


def run_directory(folder, rows, name="run", **config):
    directory = folder / name
    directory.mkdir()
    settings = {
        "name": name,
        "model": {"hidden_size": 8, "pattern": "attn", "mixers": {"attn": {"num_heads": 2}}},
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 20},
        "train": {"steps": 200, "seq_len": 16, "global_batch_tokens": 128},
        **config,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (directory / "model.json").write_text(
        json.dumps(
            {
                "parameters": 5000,
                "embedding_parameters": 2000,
                "training_flops_per_token": 31000.0,
                "vocab_size": 64,
            }
        )
    )
    return directory
