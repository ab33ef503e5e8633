"""Chunked against recurrent Gated DeltaNet, forward and backward, on the CPU.

    python benchmarks/gated_deltanet_cpu.py [--threads 2]

Both forms are ours and are equal to 1e-10 in float64 (tests/pretrain/test_delta_rule.py). The
recurrent one is a plain loop over tokens whose backward pass is linear in T.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

from pretrain.ops import delta_rule

HEADS, K, V = 4, 128, 256


def inputs(length: int, substeps: int) -> list[torch.Tensor]:
    q = torch.randn(1, length, HEADS, K)
    k = F.normalize(torch.randn(1, substeps * length, HEADS, K), dim=-1)
    v = torch.randn(1, substeps * length, HEADS, V)
    beta = torch.rand(1, substeps * length, HEADS)
    log_decay = -torch.rand(1, length, HEADS)
    return [x.requires_grad_() for x in (q, k, v, beta, log_decay)]


def seconds(length: int, backend: str, substeps: int, repeats: int) -> float:
    """Median time of a forward and backward pass, after one to warm up."""
    *main, log_decay = tensors = inputs(length, substeps)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        output, _ = delta_rule(
            *main, log_decay=log_decay, num_householder=substeps, backend=backend
        )
        torch.autograd.grad(output.sum(), tensors)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    print(f"B=1 H={HEADS} K={K} V={V} float32, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")  # fmt: skip
    print(f"{'T':>6} {'householder':>11} {'recurrent s':>12} {'chunked s':>10} "
          f"{'tokens/s':>9} {'ratio':>7}")  # fmt: skip
    for length, substeps in ((512, 1), (2048, 1), (8192, 1), (512, 2), (2048, 2)):
        chunked = seconds(length, "chunked", substeps, 9 if length <= 2048 else 5)
        speed = f"{chunked:>10.4f} {length / chunked:>9,.0f}"
        if length > 2048:  # autograd's loop keeps every state: 20 GB at T = 8192
            print(f"{length:>6} {substeps:>11} {'-':>12} {speed}")
            continue
        recurrent = seconds(length, "recurrent", substeps, 5)
        ratio = recurrent / chunked
        print(f"{length:>6} {substeps:>11} {recurrent:>12.3f} {speed} {ratio:>6.1f}x")


if __name__ == "__main__":
    main()
