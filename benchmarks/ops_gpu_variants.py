"""Provide what benchmarks/ops_gpu.py sets M2RNN's and ParaRNN's kernels against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.m2rnn_history import M2RNNWithHistory
from benchmarks.ops_gpu_cases import TOKENS, Case
from benchmarks.ops_gpu_timing import Device, first, floors, passes
from pretrain.ops.m2rnn import kernels as m2rnn_kernels
from pretrain.ops.para_rnn import kernels as para_rnn_kernels

Tiles = tuple[str, Any, str, Any]  # a label, and the function of a module that gives other sizes


def against_history(device: Device, case: Case) -> None:
    """Compare M2RNN with the stand-in for the published kernel: time, and memory beyond inputs."""
    print(f"\n{'m2rnn, backend':<28} {'T':>6} {'B':>3} {'both ms':>9} {'peak MB':>9}")
    for length in (16,) if device.smoke else (1024, 4096, 16384):
        batch = 1 if device.smoke else TOKENS // length
        wanted, call = case.make(16 if device.smoke else 1024, batch, length, device.dtype)
        cu = torch.arange(batch + 1, device=device.name) * length

        def stand_in(_: str, wanted: list[Tensor] = wanted, cu: Tensor = cu) -> Tensor:
            q, k, v, weight, forget = wanted
            return M2RNNWithHistory.apply(
                *(t.flatten(0, 1) for t in (q, k, v)), weight, forget.flatten(0, 1), cu
            )

        found = []
        for name, run in (("triton", call), ("stand-in, full history", stand_in)):
            _, both = passes(wanted, run, "triton")
            took, peak = device.milliseconds(both), 0.0
            if device.gpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                both()
                peak = (torch.cuda.max_memory_allocated() - before) / 1e6
            found.append((took, peak))
            print(f"{name:<28} {length:>6} {batch:>3} {took:>9.3f} {peak:>9,.0f}", flush=True)
        print(
            f"{'':<28} {'ratio':>10} {found[1][0] / found[0][0]:>9.2f} "
            f"{found[1][1] / max(found[0][1], 1e-9):>9.2f}",
            flush=True,
        )


def against_stepping(device: Device, chosen: list[Case], rates: Any, longest: int) -> None:
    """Compare the ParaRNN kernels with the sequential torch loop, forward and backward."""
    print(
        f"\n{'cell':<10} {'D':>5} {'B':>3} {'T':>6} {'loop ms':>10} {'kernel':<7} {'ms':>10} "
        f"{'ratio':>8} {'floor ms':>9} {'kernel / floor':>15}"
    )
    cells: dict[str, list[Case]] = {}
    for case in chosen:
        cells.setdefault(case.name.split(",")[0], []).append(case)
    for name, kinds in cells.items():
        for power in (4,) if device.smoke else range(9, longest + 1):
            batch, width = (1, 16) if device.smoke else (8, 1024)
            wanted, call = kinds[0].make(width, batch, 2**power, device.dtype)
            forward, loop = passes(wanted, call, "sequential")
            floor = floors(wanted, first(forward()), 0, kinds[0].states, *rates)[1]
            slow = device.milliseconds(loop)
            for case in kinds:
                _, both = passes(wanted, call, case.fast)
                took = device.milliseconds(both)
                print(
                    f"{name:<10} {width:>5} {batch:>3} {2**power:>6} {slow:>10.1f} "
                    f"{case.fast.split('_')[1]:<7} {took:>10.3f} {slow / took:>7.0f}x "
                    f"{floor:>9.3f} {took / floor:>15.1f}",
                    flush=True,
                )


def small_tiles() -> None:
    """Give the ParaRNN kernels tiles that an interpreter is done with in seconds."""
    sizes = {"S": 4, "L": 4, "C": 4, "AHEAD": 2, "num_warps": 1, "num_stages": 1}
    para_rnn_kernels.segments = lambda parts, dim: sizes


def other_tiles(device: Device, chosen: dict[str, Case]) -> None:
    """Time the kernels of M2RNN and ParaRNN in other tiles than theirs, most promising first."""
    print(f"\n{'kernel':<10} {'tiles':<58} {'forward':>9} {'both':>9}")
    variants = {"m2rnn": m2rnn_tiles, "para_gru": para_rnn_tiles, "para_lstm": para_rnn_tiles}
    for name, tiles in variants.items():
        full_name = f"{name}, shooting" if "para" in name else name
        if full_name not in chosen:
            continue
        for label, module, attribute, sizes in tiles():
            used = getattr(module, attribute)
            setattr(module, attribute, sizes)
            try:
                times = times_at_410m(device, chosen[full_name])
                print(f"{name:<10} {label:<58} {times[0]:>9.3f} {times[1]:>9.3f}", flush=True)
            except Exception as problem:  # a size that the compiler does not take
                print(f"{name:<10} {label:<58} {type(problem).__name__}", flush=True)
            finally:
                setattr(module, attribute, used)
            if device.smoke and label != "as they are":
                break


def times_at_410m(device: Device, case: Case) -> tuple[float, float]:
    """Return milliseconds of a forward, and of a forward and a backward pass, by our kernels."""
    shape = (16, 1, 16) if device.smoke else (1024, 8, 4096)
    forward, both = passes(*case.make(*shape, device.dtype), case.fast)
    return device.milliseconds(forward), device.milliseconds(both)


def m2rnn_tiles() -> Iterator[Tiles]:
    """Yield the tiles of M2RNN's kernels that are tried, those of the backward pass first."""
    used = m2rnn_kernels.blocks
    yield "as they are", m2rnn_kernels, "blocks", used

    def changed(which: bool, changes: dict[str, int]) -> Any:
        """Return the sizes with changes in the backward or in the forward pass."""

        def sizes(*arguments: int, backward: bool) -> dict[str, int]:
            found = used(*arguments, backward=backward)
            if backward != which:
                return found
            return {k: v for k, v in found.items() if k != "maxnreg"} | changes

        return sizes

    for rows, warps, piece, registers in (
        (32, 1, 2, None),
        (32, 1, 4, None),
        (32, 1, 4, 168),
        (16, 1, 4, None),
        (16, 1, 4, 128),
        (32, 1, 8, None),
        (16, 1, 8, None),
        (32, 2, 4, None),
        (64, 1, 2, None),
        (64, 2, 4, None),
        (64, 4, 8, None),
    ):
        changes = {"BLOCK_K": rows, "num_warps": warps, "PIECE": piece}
        label = f"backward {rows} rows, {warps} warps, pieces of {piece}"
        if registers is not None:
            changes["maxnreg"] = registers
            label += f", {registers} registers"
        yield label, m2rnn_kernels, "blocks", changed(True, changes)
    for rows, warps in ((16, 1), (32, 1), (64, 2), (64, 4)):
        changes = {"BLOCK_K": rows, "num_warps": warps}
        label = f"forward {rows} rows, {warps} warps"
        yield label, m2rnn_kernels, "blocks", changed(False, changes)


def para_rnn_tiles() -> Iterator[Tiles]:
    """Yield the tiles of the ParaRNN kernels that are tried."""
    yield "as they are", para_rnn_kernels, "segments", para_rnn_kernels.segments
    for count, length, channels, ahead in (
        (8, 32, 16, 4),
        (16, 64, 16, 4),
        (16, 32, 16, 8),
        (32, 32, 8, 4),
        (32, 32, 16, 4),
        (64, 32, 8, 4),
    ):
        sizes = {"S": count, "L": length, "C": channels, "AHEAD": ahead}
        sizes |= {"num_warps": count * channels // 32, "num_stages": 1}
        label = f"{count} segments of {length}, {channels} channels, {ahead} ahead"
        yield label, para_rnn_kernels, "segments", lambda parts, dim, sizes=sizes: sizes
