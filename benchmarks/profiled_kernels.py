"""Run M2RNN's and ParaGRU's forward kernels once each, for a profiler to look at.

    ncu --clock-control none --kernel-name regex:forward_kernel \
        python -m benchmarks.profiled_kernels [--smoke]

Shapes are those of the 410M models, 8 sequences of 4096 tokens. ``--smoke`` runs tiny ones on any
machine, also on a CPU with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.ops_gpu_cases import cases
from benchmarks.ops_gpu_timing import Device, passes
from benchmarks.ops_gpu_variants import small_tiles

PROFILED = ("m2rnn", "para_gru, shooting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    device = Device(parser.parse_args().smoke)
    torch.manual_seed(0)
    if not device.gpu:
        small_tiles()
    for case in cases(device.name):
        if case.name in PROFILED:
            shape = (16, 1, 16) if device.smoke else (1024, 8, 4096)
            forward, _ = passes(*case.make(*shape, device.dtype), case.fast)
            forward()
            if device.gpu:
                torch.cuda.synchronize()
            print(f"{case.name}: forward, width {shape[0]}, {shape[1]} x {shape[2]} tokens")


if __name__ == "__main__":
    main()
