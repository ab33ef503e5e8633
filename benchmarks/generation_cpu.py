"""Time generating a token after 512, 4k and 32k of context: attention against recurrent layers.

``OMP_NUM_THREADS=2 python benchmarks/generation_cpu.py`` prints the time per token and the bytes of
state of random models of one size. A recurrent model's are the same at any length.
"""

from __future__ import annotations

import platform
import time

import torch

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig
from pretrain.model.build import build_model
from pretrain.parallel.processes import start_processes, stop_processes

CONTEXTS = (512, 4096, 32_768)
TOKENS, VOCAB = 32, 4096
PATTERNS = {
    "attention": ("4*attn", {"attn": {"num_heads": 4, "num_kv_heads": 2}}),
    "gdn": ("4*gdn", {"gdn": {"num_heads": 3, "head_dim": 64}}),
    "gdn hybrid 3:1": (
        "3*gdn attn",
        {"gdn": {"num_heads": 3, "head_dim": 64}, "attn": {"num_heads": 4, "num_kv_heads": 2}},
    ),
    "para_lstm": ("4*para_lstm", {"para_lstm": {"num_heads": 2}}),
}


def measure(pattern: str, mixers: dict[str, dict[str, int]], context: int) -> tuple[float, int]:
    """Return the seconds per token, and the bytes of all states, after ``context`` tokens."""
    values = {"hidden_size": 256, "pattern": pattern, "mixers": mixers}
    model = build_model(build_config(ModelConfig, values, "benchmark"), VOCAB, seed=0).eval()
    ids = torch.randint(VOCAB, (1, context))
    states = None
    with torch.no_grad():
        for part in ids.split(4096, dim=1):
            _, states = model.forward_with_state(part, states)
        assert states is not None
        times = []
        for token in torch.randint(VOCAB, (TOKENS,)):
            begun = time.perf_counter()
            _, states = model.forward_with_state(token.view(1, 1), states)
            times.append(time.perf_counter() - begun)
    size = sum(t.numel() * t.element_size() for state in states for t in state.values())
    return sorted(times)[TOKENS // 2], size


def main() -> None:
    torch.manual_seed(0)
    start_processes()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        "4 blocks, 256 wide, float32"
    )
    print(f"{'model':16}" + "".join(f"{c:>10,} tokens before     " for c in CONTEXTS) + "growth")
    for name, (pattern, mixers) in PATTERNS.items():
        found = [measure(pattern, mixers, context) for context in CONTEXTS]
        row = "".join(f"{1 / s:8.1f} tok/s {b / 2**20:8.2f} MiB   " for s, b in found)
        print(
            f"{name:16}{row}{found[-1][0] / found[0][0]:5.2f}x time "
            f"{found[-1][1] / found[0][1]:5.1f}x bytes",
            flush=True,
        )
    stop_processes()


if __name__ == "__main__":
    main()
