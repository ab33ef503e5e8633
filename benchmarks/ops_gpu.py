"""Time every op's GPU form against the card's roofline and against its obvious alternative.

    python -m benchmarks.ops_gpu [--only NAME ...] [--sizes 410M 1B 7B]
                                 [--lengths 1024 4096 16384 65536] [--smoke]
                                 [--parts ops published loop tiles]

First the card's rates are measured, by a large copy (bytes read and written) and a large bf16
matrix product. Then, for each op, shape and length T (32,768 tokens at a time, at least one
sequence), the median times of a forward pass and of a forward and a backward pass; ``floor``: the
larger of bytes (each input, output and gradient once for each pass) over the copy's rate and
tensor-core FLOPs over the product's; ``share``: floor / time; ``ratio``: time of the alternative /
time, both forward and backward in this run; ``error``: the largest error of the fast form's output
and gradients against the definition in float64, at 200 tokens.

The alternatives are this project's plain torch forms (chunked, checkpointed). ``--parts`` chooses
this table and others: ``published``, M2RNN against a stand-in for the published kernel
(benchmarks/m2rnn_history.py), with the peak memory of both; ``loop``, the ParaRNN cells against the
sequential torch loop, at T = 512 to 16384; and, only where it is asked for, ``tiles``, the kernels
of M2RNN and ParaRNN in other tiles. ``--smoke`` runs everything on tiny shapes on any machine, also
on a CPU with TRITON_INTERPRET=1; its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops_gpu_cases import SIZES, TOKENS, Case, cases
from benchmarks.ops_gpu_timing import Device, first, floors, passes
from benchmarks.ops_gpu_variants import (
    against_history,
    against_stepping,
    other_tiles,
    small_tiles,
)

PARTS = ("ops", "published", "loop", "tiles")


def largest_error(case: Case, device: Device) -> float:
    """Return the fast form's error in ``device.dtype`` against the definition in float64."""
    results: list[list[Tensor]] = []
    for backend, dtype in ((case.fast, device.dtype), (case.definition, torch.float64)):
        torch.manual_seed(0)
        wanted, call = case.make(*((16, 1, 40) if device.smoke else (128, 1, 200)), device.dtype)
        if dtype == torch.float64:
            # The call's tensors are those in ``wanted``: widened where they are.
            for tensor in wanted:
                tensor.data = tensor.data.double()
        for tensor in wanted:
            tensor.requires_grad_()
        output = first(call(backend))
        generator = torch.Generator(device.name).manual_seed(1)
        weights = torch.randn(output.shape, generator=generator, device=device.name)
        gradients = torch.autograd.grad((output.double() * weights).sum(), wanted)
        results.append([output, *gradients])
    return max(
        float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30))
        for a, b in zip(*results, strict=True)
    )


def one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0]}"


def op_table(
    device: Device,
    chosen: list[Case],
    chosen_sizes: Sequence[str],
    lengths: Sequence[int],
    rates: Any,
) -> None:
    print(
        f"\n{'op':<26} {'size':>5} {'T':>6} {'B':>3} {'forward ms':>10} {'floor':>8} "
        f"{'share':>6} {'both ms':>9} {'floor':>8} {'share':>6} {'tokens/s':>11} "
        f"{'against':<13} {'ratio':>7} {'error':>8}"
    )
    for case in chosen:
        error: float | str
        try:
            error = f"{largest_error(case, device):.1e}"
        except Exception as problem:  # whatever a library or a compiler finds wrong with it
            print(f"{case.name:<26} not available: {one_line(problem)}", flush=True)
            continue
        sizes = {"tiny": 16} if device.smoke else {name: SIZES[name] for name in chosen_sizes}
        for size, width in sizes.items():
            for length in (16,) if device.smoke else lengths:
                batch = 1 if device.smoke else max(TOKENS // length, 1)
                try:
                    row(device, case, size, width, batch, length, rates, error)
                except Exception as problem:
                    print(
                        f"{case.name:<26} {size:>5} {length:>6} {batch:>3} {one_line(problem)}",
                        flush=True,
                    )


def row(
    device: Device,
    case: Case,
    size: str,
    width: int,
    batch: int,
    length: int,
    rates: Any,
    error: str,
) -> None:
    wanted, call = case.make(width, batch, length, device.dtype)
    forward, both = passes(wanted, call, case.fast)
    tokens = batch * length
    floor = floors(wanted, first(forward()), case.flops(wanted) * tokens, case.states, *rates)
    times = device.milliseconds(forward), device.milliseconds(both)
    ratio = ""
    if length <= case.longest_alternative and case.alternative != case.fast:
        try:
            _, other = passes(wanted, call, case.alternative)
            ratio = f"{device.milliseconds(other) / times[1]:.1f}x"
        except torch.cuda.OutOfMemoryError:
            ratio = "memory"
    print(
        f"{case.name:<26} {size:>5} {length:>6} {batch:>3} {times[0]:>10.3f} {floor[0]:>8.3f} "
        f"{floor[0] / times[0]:>6.1%} {times[1]:>9.3f} {floor[1]:>8.3f} "
        f"{floor[1] / times[1]:>6.1%} {tokens / times[1] * 1e3:>11,.0f} {case.alternative:<13} "
        f"{ratio:>7} {error:>8}",
        flush=True,
    )


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="ops whose name contains one of these")
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=["410M"])
    parser.add_argument("--lengths", nargs="*", type=int, default=[4096, 16384])
    parser.add_argument(
        "--longest-loop",
        type=int,
        default=14,
        metavar="P",
        help="the sequential loop goes up to T = 2^P",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:3])
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    device = Device(arguments.smoke)
    torch.manual_seed(0)
    copy, product = device.rates()
    packages = ("torch", "triton", "flash-linear-attention", "flash-attn", "liger-kernel")
    print(f"$ python -m benchmarks.ops_gpu {' '.join(sys.argv[1:])}")
    print(
        f"{torch.cuda.get_device_name() if device.gpu else 'CPU, interpreted'}, "
        f"{datetime.date.today()}, {', '.join(map(version, packages))}"
    )
    print(f"copy {copy / 1e12:.2f} TB/s, {device.dtype} product {product / 1e12:.0f} TFLOP/s")
    chosen = [
        case
        for case in cases(device.name)
        if not arguments.only or any(part in case.name for part in arguments.only)
    ]
    names = {case.name: case for case in chosen}
    cells = [case for case in chosen if case.name.startswith("para")]
    if not device.gpu:
        small_tiles()
    if "ops" in arguments.parts:
        op_table(device, chosen, arguments.sizes, arguments.lengths, (copy, product))
    if "published" in arguments.parts and "m2rnn" in names:
        against_history(device, names["m2rnn"])
    if "loop" in arguments.parts and cells:
        against_stepping(device, cells, (copy, product), arguments.longest_loop)
    if "tiles" in arguments.parts:
        other_tiles(device, names)


if __name__ == "__main__":
    main()
