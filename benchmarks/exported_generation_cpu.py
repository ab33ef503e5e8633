"""Time ``generate`` of exported models: with their cache against computing the text anew.

``OMP_NUM_THREADS=2 python benchmarks/exported_generation_cpu.py [--tokens 1000]`` exports random
models, loads them with transformers, and prints tokens per second of both, measured one after
another in the same run. The texts are compared too.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import torch
import transformers

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig
from pretrain.export.hugging_face import write_hugging_face
from pretrain.model.build import build_model
from pretrain.parallel.processes import start_processes, stop_processes

VOCAB = 1024
PATTERNS = {
    "gdn hybrid 3:1": ("3*gdn attn", {}),
    "m2rnn": ("4*m2rnn", {"m2rnn": {"num_heads": 2, "head_dim": 16, "value_dim": 16}}),
    "mamba2 kda mlstm": ("mamba2 kda mlstm", {}),
}


def measure(pattern: str, mixers: dict[str, dict[str, int]], tokens: int, folder: Path) -> str:
    """Return a line of the table."""
    values = {"hidden_size": 128, "pattern": pattern, "mixers": mixers, "init_std": 0.1}
    model = build_model(build_config(ModelConfig, values, "benchmark"), VOCAB, seed=0).eval()
    write_hugging_face(model, folder, tokens, 0, torch.float32)
    size = (folder / "modeling_hybrid.py").stat().st_size
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = torch.randint(1, VOCAB, (1, 16))
    speeds, texts = [], []
    for use_cache in (True, False):
        begun = time.perf_counter()
        text = theirs.generate(
            prompt,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            use_cache=use_cache,
        )
        speeds.append(tokens / (time.perf_counter() - begun))
        texts.append(text[0].tolist())
    agree = next((i for i, pair in enumerate(zip(*texts, strict=True)) if pair[0] != pair[1]), None)
    same = "same text" if agree is None else f"texts part at token {agree - 16}"
    return (
        f"{speeds[0]:8.1f} tok/s with a cache {speeds[1]:8.1f} without "
        f"{speeds[0] / speeds[1]:6.1f}x"
        f"   {same}   code {size / 1000:.0f} kB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1000)
    given = parser.parse_args()
    torch.manual_seed(0)
    start_processes()
    transformers.logging.set_verbosity_error()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, 128 wide, float32, {given.tokens} tokens"
    )
    for name, (pattern, mixers) in PATTERNS.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name:18}{measure(pattern, mixers, given.tokens, Path(folder))}", flush=True)
    stop_processes()


if __name__ == "__main__":
    main()
