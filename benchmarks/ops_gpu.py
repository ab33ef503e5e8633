"""Time every op's GPU form against the card's roofline and against its obvious alternative.

    python -m benchmarks.ops_gpu [--only NAME ...] [--sizes 410M 1B 7B]
                                 [--lengths 1024 4096 16384 65536] [--tune] [--smoke]

First the card's rates are measured, by a large copy (bytes read and written) and a large bf16
matrix product. Then, for each op, shape and length T (32,768 tokens at a time, at least one
sequence), the median times of a forward pass and of a forward and a backward pass; ``floor``: the
larger of bytes (each input, output and gradient once for each pass) over the copy's rate and
tensor-core FLOPs over the product's; ``share``: floor / time; ``ratio``: time of the alternative /
time, both forward and backward in this run; ``error``: the largest error of the fast form's output
and gradients against the definition in float64, at 200 tokens.

The alternatives are this project's plain torch forms (chunked, checkpointed); for M2RNN also a
stand-in for the published kernel (benchmarks/m2rnn_history.py), with the peak memory of both; for
the ParaRNN cells the sequential torch loop, at T = 512 to 16384. ``--tune`` tries other tile sizes.
``--smoke`` runs everything on tiny shapes on any machine, also on a CPU with TRITON_INTERPRET=1;
its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.m2rnn_history import M2RNNWithHistory
from pretrain.nn.mixers.parts import delta_rule_flops, linear_attention_flops
from pretrain.ops import (
    attention,
    delta_rule,
    linear_attention,
    m2rnn,
    para_gru,
    para_lstm,
    rnn,
    short_convolution,
)
from pretrain.ops.attention.dispatch import fast_attention
from pretrain.ops.cross_entropy.linear_cross_entropy import linear_cross_entropy
from pretrain.ops.rnn.cells import CELLS

SIZES = {"410M": 1024, "1B": 2048, "7B": 4096}  # model widths
TOKENS = 32768
Run = Callable[[str], Any]  # backend to output (and states)


@dataclass
class Case:
    """An op to time.

    make: takes (width, batch size, T, dtype) and returns the tensors with gradients, and a call by
    backend; flops: tensor-core FLOPs of a token's forward pass, from the tensors; definition, fast,
    alternative: backends.
    """

    name: str
    make: Callable[[int, int, int, torch.dtype], tuple[list[Tensor], Run]]
    flops: Callable[[Sequence[Tensor]], float]
    definition: str
    fast: str
    alternative: str
    longest_alternative: int = 65536
    states: int = 0  # tensors as large as the output that the backward pass reads, that among them


class Device:
    """The device of the benchmark, and its clock.

    Times are medians over about 200 milliseconds of runs; runs of more than 300 are timed once.
    """

    def __init__(self, smoke: bool):
        self.gpu = torch.cuda.is_available()
        if not self.gpu and not smoke:
            raise SystemExit("there is no GPU here: --smoke runs tiny shapes wherever it is")
        self.name = "cuda" if self.gpu else "cpu"
        # The interpreter has no bfloat16.
        self.dtype = torch.bfloat16 if self.gpu else torch.float16
        self.smoke = smoke

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """Return the median time of several runs, after a warm-up."""
        if not self.gpu:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        first, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def together(times: int) -> float:
            """Return the milliseconds per run of ``times`` in a row, which hides their launches."""
            torch.cuda.synchronize()
            first.record()
            for _ in range(times):
                run()
            end.record()
            torch.cuda.synchronize()
            return first.elapsed_time(end) / times

        run()  # compiles, tunes
        once = together(1)
        if once > 300 or self.smoke:
            return once
        return statistics.median(together(max(1, min(20, int(40 / once)))) for _ in range(5))

    def rates(self) -> tuple[float, float]:
        """Return (bytes per second of a copy, FLOP/s of a matrix product), of random data."""
        size = 1 << (12 if self.smoke else 30)
        source = torch.randn(size // 2, device=self.name).to(self.dtype)
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / self.milliseconds(lambda: target.copy_(source)) * 1e3
        n = 64 if self.smoke else 8192
        a, b = torch.randn(2, n, n, device=self.name).to(self.dtype).unbind(0)
        return copy, 2 * n**3 / self.milliseconds(lambda: a @ b) * 1e3


def normal(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def cases(device: str) -> list[Case]:
    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        return normal(device, dtype, *shape)

    def wide(dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    def uniform(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.rand(shape, device=device).to(dtype)

    def softmax(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
        q, k, v = (of(dtype, batch, length, max(width // 128, 1), 128) for _ in "qkv")
        return [q, k, v], lambda backend: attention(q, k, v, backend=backend)

    def delta(steps: int, channel: bool = False) -> Any:
        def make(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
            heads, value_dim = max(width // 256, 1), 128 if channel else 256
            q = of(dtype, batch, length, heads, 128)
            k = F.normalize(of(dtype, batch, steps * length, heads, 128), dim=-1)
            v = of(dtype, batch, steps * length, heads, value_dim)
            beta = uniform(dtype, batch, steps * length, heads)
            decay = -uniform(wide(dtype), *q.shape[: 4 if channel else 3])
            return [q, k, v, beta, decay], lambda backend: delta_rule(
                q, k, v, beta, log_decay=decay, num_householder=steps, backend=backend
            )

        return make

    def linear(axes: int) -> Any:
        def make(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
            heads = max(width // 256, 1)
            q, k = (of(dtype, batch, length, heads, 128) for _ in "qk")
            v = of(dtype, batch, length, heads, 256)
            decay = -uniform(wide(dtype), *q.shape[:axes])
            return [q, k, v, decay], lambda backend: linear_attention(
                q, k, v, log_decay=decay, backend=backend
            )

        return make

    def matrix_rnn(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
        heads = max(84 * width // 1024, 2)
        q, k = (of(dtype, batch, length, 1, 64) for _ in "qk")
        v, weight = of(dtype, batch, length, heads, 16), of(dtype, heads, 16, 16) / 4
        forget = uniform(wide(dtype), batch, length, heads)
        return [q, k, v, weight, forget], lambda backend: m2rnn(
            q, k, v, weight, forget, state_grad_clip=1.0, backend=backend
        )

    def para(cell: str) -> Any:
        def make(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
            u = of(dtype, batch, length, 3, width)
            a, c, bias = (0.5 * torch.tanh(of(wide(dtype), n, width)) for n in (3, 2, 3))
            if cell == "gru":
                return [u, a, bias], lambda backend: para_gru(u, a, bias, backend=backend)
            return [u, a, c, bias], lambda backend: para_lstm(u, a, c, bias, backend=backend)

        return make

    def classical(cell: str, dim: int) -> Any:
        def make(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
            kind, heads = CELLS[cell], max(width // dim, 1)
            x = of(dtype, batch, length, kind.gates, heads, dim)
            weight = of(dtype, heads, dim, kind.gates, dim) / dim**0.5
            bias = of(wide(dtype), kind.biases, heads, dim)
            return [x, weight, bias], lambda backend: rnn(
                x, weight, bias, cell=cell, backend=backend
            )

        return make

    def convolution(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
        x, weight = of(dtype, batch, length, width), of(dtype, width, 4)
        return [x, weight], lambda backend: short_convolution(
            x, weight, activation="silu", backend=backend
        )

    def head(width: int, batch: int, length: int, dtype: torch.dtype) -> Any:
        vocab = 100352 if width >= min(SIZES.values()) else 100
        x, weight = of(dtype, batch * length, width), of(dtype, vocab, width) / width**0.5
        targets = torch.randint(0, vocab, (batch * length,), device=device)
        return [x, weight], lambda backend: linear_cross_entropy(
            x, weight, targets, tokens_at_once=4096, backend=backend
        )

    def rule(steps: int, per_channel: bool = False) -> Callable[[Sequence[Tensor]], float]:
        return lambda t: (
            t[0].shape[2]
            * delta_rule_flops(t[0].shape[-1], t[2].shape[-1], 64, steps, per_channel=per_channel)
        )

    def read(per_channel: bool = False) -> Callable[[Sequence[Tensor]], float]:
        return lambda t: (
            t[0].shape[2]
            * linear_attention_flops(t[0].shape[-1], t[2].shape[-1], 64, per_channel=per_channel)
        )

    fastest = fast_attention(torch.empty(1, 128, dtype=torch.bfloat16, device=device))

    def none(_: Sequence[Tensor]) -> float:
        return 0.0

    return [
        Case(
            "attention",
            softmax,
            lambda t: 2.0 * t[0].shape[1] * t[0].shape[2] * 128,
            "explicit",
            fastest,
            "sdpa",
        ),
        Case("delta_rule (gdn)", delta(1), rule(1), "recurrent", "fla", "chunked"),
        Case("delta_rule n=2", delta(2), rule(2), "recurrent", "fla", "chunked"),
        Case(
            "delta_rule (kda)", delta(1, True), rule(1, True), "recurrent", "fla", "chunked", 4096
        ),
        Case("linear_attention (mamba2)", linear(3), read(), "recurrent", "fla", "chunked"),
        Case("linear_attention (gla)", linear(4), read(True), "recurrent", "fla", "chunked", 4096),
        Case(
            "m2rnn",
            matrix_rnn,
            lambda t: 2.0 * t[2].shape[2] * t[0].shape[-1] * t[2].shape[-1] ** 2,
            "recurrent",
            "triton",
            "checkpointed",
            1024,
        ),
        *(
            Case(
                f"para_{cell}, {how}",
                para(cell),
                none,
                "sequential",
                f"triton_{how}",
                "newton",
                states=states,
            )
            for cell, states in (("gru", 1), ("lstm", 2))
            for how in ("shooting", "steps")
        ),
        *(
            Case(
                f"rnn {cell} D={d}",
                classical(cell, d),
                lambda t: 2.0 * t[1].numel(),
                "recurrent",
                "triton",
                "checkpointed",
                1024,
            )
            for cell in CELLS
            for d in (64, 128)
        ),
        Case("short_convolution", convolution, none, "taps", "fla", "taps"),
        Case(
            "linear_cross_entropy",
            head,
            lambda t: 2.0 * t[1].numel(),
            "chunked",
            "liger",
            "chunked",
            4096,
        ),
    ]


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def passes(wanted: list[Tensor], call: Run, backend: str) -> tuple[Any, Any]:
    """Return functions that run a forward pass, and a forward and a backward pass."""
    for tensor in wanted:
        tensor.requires_grad_()
    with torch.no_grad():
        like = torch.randn_like(first(call(backend)))

    def forward() -> Any:
        with torch.no_grad():
            return call(backend)

    def both() -> Any:
        return torch.autograd.grad(first(call(backend)), wanted, like)

    return forward, both


def largest_error(case: Case, device: Device) -> float:
    """Return the fast form's error in ``device.dtype`` against the definition in float64."""
    results: list[list[Tensor]] = []
    for backend, dtype in ((case.fast, device.dtype), (case.definition, torch.float64)):
        torch.manual_seed(0)
        wanted, call = case.make(128, 1, 40 if device.smoke else 200, device.dtype)
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
        float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
        for a, b in zip(*results, strict=True)
    )


def floors(
    wanted: list[Tensor], output: Tensor, flops: float, states: int, copy: float, product: float
) -> Any:
    """Return the least milliseconds of a forward pass, and of a forward and a backward pass."""
    read, written = sum(t.nbytes for t in wanted), output.nbytes
    forward = max((read + written) / copy, flops / product)
    kept = max((read + max(states, 1) * written) / copy, flops / product)
    backward = max((2 * read + (1 + states) * written) / copy, 2 * flops / product)
    return 1e3 * forward, 1e3 * (kept + backward)


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
        sizes = {"tiny": 64} if device.smoke else {name: SIZES[name] for name in chosen_sizes}
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


def against_history(device: Device, case: Case) -> None:
    """Compare M2RNN with the stand-in for the published kernel: time, and memory beyond inputs."""
    print(f"\n{'m2rnn, backend':<28} {'T':>6} {'B':>3} {'both ms':>9} {'peak MB':>9}")
    for length in (16,) if device.smoke else (1024, 4096, 16384):
        batch = 1 if device.smoke else TOKENS // length
        wanted, call = case.make(64 if device.smoke else 1024, batch, length, device.dtype)
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


def tune(device: Device, found: dict[str, Case]) -> None:
    """Time the kernels at other tile sizes; the ones in use are marked."""
    from pretrain.ops.m2rnn import kernels as of_m2rnn
    from pretrain.ops.para_rnn import kernels as of_para_rnn

    def attempt(name: str, module: Any, blocks: Any, label: str) -> None:
        case = found[f"{name}, shooting" if "para" in name else name]
        wanted, call = case.make(
            64 if device.smoke else 1024,
            1 if device.smoke else 8,
            16 if device.smoke else 4096,
            device.dtype,
        )
        of_tiles = "segments" if "para" in name else "blocks"
        used = getattr(module, of_tiles)
        setattr(module, of_tiles, blocks)
        backend = "triton_shooting" if "para" in name else "triton"
        try:
            forward, both = passes(wanted, call, backend)
            times = device.milliseconds(forward), device.milliseconds(both)
            print(f"{name:<10} {label:<58} {times[0]:>9.3f} {times[1]:>9.3f}", flush=True)
        except Exception as problem:  # a size that the compiler does not take
            print(f"{name:<10} {label:<58} {type(problem).__name__}", flush=True)
        finally:
            setattr(module, of_tiles, used)

    print(f"\n{'kernel':<10} {'tiles':<58} {'forward':>9} {'both':>9}")
    used = of_m2rnn.blocks
    attempt("m2rnn", of_m2rnn, used, "as they are")
    for rows, warps in ((16, 1), (32, 1), (64, 2), (64, 4)):

        def forward_tiles(k: int, v: int, *, backward: bool, r: int = rows, w: int = warps) -> Any:
            sizes = used(k, v, backward=backward)
            return sizes if backward else sizes | {"BLOCK_K": r, "num_warps": w}

        attempt("m2rnn", of_m2rnn, forward_tiles, f"forward {rows} rows, {warps} warps")
    for rows, warps, piece in (
        (16, 1, 4),
        (16, 1, 8),
        (32, 1, 2),
        (32, 1, 8),
        (32, 2, 4),
        (64, 1, 2),
        (64, 2, 4),
        (64, 4, 8),
    ):

        def backward_tiles(
            k: int, v: int, *, backward: bool, r: int = rows, w: int = warps, p: int = piece
        ) -> Any:
            sizes = used(k, v, backward=backward)
            return sizes | {"BLOCK_K": r, "num_warps": w, "PIECE": p} if backward else sizes

        label = f"backward {rows} rows, {warps} warps, pieces of {piece}"
        attempt("m2rnn", of_m2rnn, backward_tiles, label)
    for name in ("para_gru", "para_lstm"):
        attempt(name, of_para_rnn, of_para_rnn.segments, "as they are")
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
            attempt(name, of_para_rnn, lambda parts, dim, sizes=sizes: sizes, label)


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
    parser.add_argument("--tune", action="store_true")
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
    every = cases(device.name)
    chosen = [
        c for c in every if not arguments.only or any(part in c.name for part in arguments.only)
    ]
    op_table(device, chosen, arguments.sizes, arguments.lengths, (copy, product))
    names = {case.name: case for case in chosen}
    if "m2rnn" in names:
        against_history(device, names["m2rnn"])
    if cells := [case for case in chosen if case.name.startswith("para")]:
        against_stepping(device, cells, (copy, product), arguments.longest_loop)
    if arguments.tune:
        tune(device, {case.name: case for case in every})


if __name__ == "__main__":
    main()
