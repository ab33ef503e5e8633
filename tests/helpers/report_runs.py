"""Runs of which tests make reports."""

from __future__ import annotations

import json
from typing import Any

from tests.helpers.scaling_runs import run_directory


def rows(level, steps=200, every=5):
    found = []
    for step in range(every, steps + 1, every):
        row = {
            "step": step,
            "tokens": step * 128,
            "loss": level + 3 * step**-0.5,
            "lr": 1e-3,
            "tokens_per_second": 1000.0 + step,
            "mfu": 0.25,
            "seconds": step * 0.5,
        }
        found.append(row)
    found.append(
        {
            "step": steps,
            "tokens": steps * 128,
            "valid_loss": level + 0.3,
            "valid_bits_per_byte": 1.5,
        }
    )
    return found


def grid_of_seeds(tmp_path):
    """Two learning rates, three seeds of one and one of the other; a run that is not done."""
    folder = tmp_path / "grid"
    folder.mkdir()
    for seed, level in enumerate((3.0, 3.02, 3.04)):
        run_directory(folder, rows(level), f"low-{seed}", seed=seed)
    high = run_directory(folder, rows(2.5), "high", optimizer={"lr": 3e-3})
    (high / "evals").mkdir()
    (high / "evals/perplexity-step-1.json").write_text(
        json.dumps({"task": "perplexity", "step": 200, "bits_per_byte": 1.25})
    )
    run_directory(folder, rows(3.5)[:10], "short", optimizer={"lr": 1e-4})
    (folder / "grid.json").write_text(json.dumps({"config": "g.yaml", "match": "flops"}))
    (folder / "empty").mkdir()
    return folder


ARMS: dict[str, dict[str, Any]] = {
    "attn": {"pattern": "2*attn", "mlp": {"intermediate_size": 40}},
    "hybrid": {"pattern": "gru attn", "mlp": {"intermediate_size": 32}},
    "gru": {"pattern": "2*gru", "mlp": {"intermediate_size": 24}},
}


def arms_of_a_grid(folder, seeds=1, *, labels=True):
    """Three arms matched in parameters, best first; without labels as older grids noted them."""
    folder.mkdir()
    noted = {}
    for number, (arm, model) in enumerate(ARMS.items()):
        mixers = {"attn": {"num_heads": 2}, "gru": {}}
        for seed in range(seeds):
            name = f"pattern={arm},seed={seed}"
            noted[name] = {"model.pattern": arm, "seed": str(seed)}
            model = {"hidden_size": 8, "mixers": mixers, **model}
            run_directory(folder, rows(3.0 + number), name, seed=seed, model=model)
    grid = {"members": list(noted), **({"labels": noted} if labels else {})}
    (folder / "grid.json").write_text(json.dumps(grid))
    return folder
