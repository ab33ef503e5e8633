"""Time every op's fast form against its definition, forward and backward, on the CPU.

    python benchmarks/ops_cpu.py [--threads 2] [--only NAME ...]

Both forms are this project's and agree to 1e-10 in float64 (tests/pretrain/ops). The definitions
are plain loops over time whose backward pass is linear in T; those of matrix states are skipped
where autograd would keep more than about 8 GB of states. ``growth`` is the exponent of T in the
fast form's time between 2048 and 8192; 1 is linear. Times are medians. The last table is the memory
of M2RNN's backward pass, each measured in a separate process.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops import (
    MirasRule,
    delta_rule,
    diagonal_scan,
    dplr,
    linear_attention,
    log_sum_exp_gate,
    lti,
    m2rnn,
    mesa,
    miras,
    para_gru,
    para_lstm,
    plstm,
    rat,
    rnn,
)
from pretrain.ops.para_rnn.cells import ParaGRU, ParaLSTM
from pretrain.ops.rnn.cells import CELLS

LENGTHS = (512, 2048, 8192)
Call = Callable[[str], tuple[Any, ...]]  # backend to the op's result


@dataclass
class Case:
    """shape: as printed; make: T to the tensors that gradients are wanted of, and the call."""

    name: str
    shape: str
    definition: str
    fast: str
    make: Callable[[int], tuple[list[Tensor], Call]]
    longest_definition: int = 2048


def delta(substeps: int, per_channel: bool = False, values: int = 256) -> Callable[..., Any]:
    def make(length: int) -> tuple[list[Tensor], Call]:
        q = torch.randn(1, length, 4, 128)
        k = F.normalize(torch.randn(1, substeps * length, 4, 128), dim=-1)
        v = torch.randn(1, substeps * length, 4, values)
        beta = torch.rand(1, substeps * length, 4)
        decay = -torch.rand(q.shape if per_channel else q.shape[:3])
        return [q, k, v, beta, decay], lambda backend: delta_rule(
            q, k, v, beta, log_decay=decay, num_householder=substeps, backend=backend
        )

    return make


def low_rank(length: int) -> tuple[list[Tensor], Call]:
    """RWKV-7's: heads of 64, erase keys of unit norm, log-decays above -0.61."""
    q, k, v, key = torch.randn(4, 1, length, 4, 64).unbind(0)
    erase, rate = -F.normalize(key, dim=-1), torch.rand(key.shape)
    write, decay = -erase * rate, -0.6 * torch.rand(key.shape)
    return [q, k, v, erase, write, decay], lambda backend: dplr(
        q, k, v, erase, write, log_decay=decay, scale=1.0, backend=backend
    )


def linear(kind: str) -> Callable[..., Any]:
    def make(length: int) -> tuple[list[Tensor], Call]:
        q, k = torch.randn(2, 1, length, 4, 128).unbind(0)
        v = torch.randn(1, length, 4, 256)
        decay = None if kind == "none" else -torch.rand(q.shape[: 3 if kind == "head" else 4])
        wanted = [q, k, v] if decay is None else [q, k, v, decay]
        return wanted, lambda backend: linear_attention(q, k, v, log_decay=decay, backend=backend)

    return make


def softmax_gate(length: int) -> tuple[list[Tensor], Call]:
    x = torch.randn(1, length, 4, 128)
    return [x], lambda backend: log_sum_exp_gate(x, backend=backend)


def regression(length: int) -> tuple[list[Tensor], Call]:
    q, k = F.normalize(torch.randn(2, 1, length, 4, 64), dim=-1).unbind(0)
    v = torch.randn(1, length, 4, 64)
    beta, decay = torch.rand(2, 1, length, 4).unbind(0)
    ridge = torch.ones(4, 64)
    return [q, k, v, beta, ridge], lambda backend: mesa(
        q, k, v, beta, ridge, log_decay=-decay, backend=backend
    )


def matrix_rnn(length: int, heads: int = 16) -> tuple[list[Tensor], Call]:
    q, k = torch.randn(2, 1, length, 1, 64).unbind(0)
    v, weight = torch.randn(1, length, heads, 16), torch.eye(16).repeat(heads, 1, 1)
    forget = torch.rand(1, length, heads)
    return [q, k, v, weight, forget], lambda backend: m2rnn(
        q, k, v, weight, forget, backend=backend
    )


def classical(cell: str) -> Callable[..., Any]:
    def make(length: int) -> tuple[list[Tensor], Call]:
        kind = CELLS[cell]
        x = torch.randn(4, length, kind.gates, 4, 64)
        weight, bias = torch.randn(4, 64, kind.gates, 64) / 8, torch.zeros(kind.biases, 4, 64)
        return [x, weight, bias], lambda backend: rnn(x, weight, bias, cell=cell, backend=backend)

    return make


def para(cell: str, batch_size: int, dim: int) -> Callable[..., Any]:
    def make(length: int) -> tuple[list[Tensor], Call]:
        u, a, c = torch.randn(batch_size, length, 3, dim), torch.randn(3, dim), torch.randn(2, dim)
        a, c = (0.5 * torch.tanh(w) for w in (a, c))
        if cell == "gru":
            return [u, a], lambda backend: para_gru(u, a, backend=backend)
        return [u, a, c], lambda backend: para_lstm(u, a, c, backend=backend)

    return make


def scan(length: int) -> tuple[list[Tensor], Call]:
    x, decay = torch.randn(1, length, 1024), -torch.rand(1, length, 1024)
    return [x, decay], lambda backend: diagonal_scan(None, x, log_decay=decay, backend=backend)


def systems(length: int) -> tuple[list[Tensor], Call]:
    u, (b, c) = torch.randn(1, length, 256), torch.randn(2, 256, 32, dtype=torch.complex64)
    step = torch.logspace(-3, -1, 256)[:, None]
    log_a = step * torch.complex(torch.tensor(-0.5), torch.pi * torch.arange(32.0))
    return [u, log_a, b, c], lambda backend: lti(u, log_a, b, c, backend=backend)


def chunk_attention(length: int) -> tuple[list[Tensor], Call]:
    q, k, v = torch.randn(3, 1, length, 4, 64).unbind(0)
    gate = torch.rand(1, length, 4, 64)
    return [q, k, v, gate], lambda backend: rat(q, k, v, gate, backend=backend)


def turned(size: int) -> Callable[..., Any]:
    def make(length: int) -> tuple[list[Tensor], Call]:
        q, k, v = torch.randn(3, 1, length, 4, 128).unbind(0)
        gates = torch.rand(4, 1, length, 4, size, size) / size
        return [q, k, v, *gates], lambda backend: plstm(q, k, v, *gates, backend=backend)

    return make


def trained_memory(layers: int) -> Callable[..., Any]:
    def make(length: int) -> tuple[list[Tensor], Call]:
        q, k, v = torch.randn(3, 1, length, 4, 64).unbind(0)
        k = torch.nn.functional.normalize(k, dim=-1)
        decay, rate = -torch.rand(q.shape) / 100, torch.rand(q.shape) / 100
        shapes = [(64, 64)] if layers == 1 else [(64, 256), (256, 64)]
        memory = [torch.randn(4, *shape) for shape in shapes]
        return [q, k, v, decay, rate, *memory], lambda backend: miras(
            q, k, v, decay, rate, memory, rule=MirasRule("l2"), backend=backend
        )

    return make


MATRIX, VECTOR = "B1 H4 K128 V256", "B4 H4 D64"
CASES = [
    Case("delta_rule, decay per head (gdn)", MATRIX, "recurrent", "chunked", delta(1)),
    Case("delta_rule, n=2 (delta_product)", MATRIX, "recurrent", "chunked", delta(2)),
    Case(
        "delta_rule, decay per channel (kda)",
        "B1 H4 K128 V128",
        "recurrent",
        "chunked",
        delta(1, per_channel=True, values=128),
    ),
    Case("dplr, decay per channel (rwkv7)", "B1 H4 K64 V64", "recurrent", "chunked", low_rank),
    Case("linear_attention", MATRIX, "recurrent", "chunked", linear("none")),
    Case("linear_attention, per head (mamba2)", MATRIX, "recurrent", "chunked", linear("head")),
    Case("linear_attention, per channel (gla)", MATRIX, "recurrent", "chunked", linear("channel")),
    Case("log_sum_exp_gate", "B1 H4 K128", "recurrent", "chunked", softmax_gate),
    Case("mesa", "B1 H4 K64 V64", "recurrent", "conjugate_gradients", regression, 512),
    Case("m2rnn", "B1 H16 K64 V16", "recurrent", "checkpointed", matrix_rnn, 8192),
    *(
        Case(f"rnn, {cell}", VECTOR, "recurrent", "checkpointed", classical(cell), 512)
        for cell in CELLS
    ),
    *(
        Case(f"para_{cell}", f"B{b} D{d}", "sequential", "newton", para(cell, b, d), 8192)
        for cell in ("gru", "lstm")
        for b, d in ((1, 64), (1, 256), (4, 256))
    ),
    Case("diagonal_scan (hgrn)", "B1 D1024", "sequential", "tiled", scan, 8192),
    Case("lti, 64 states (s4d)", "B1 D256 N64", "recurrent", "chunked", systems),
    Case("miras, linear memory", "B1 H4 D64 C16", "recurrent", "chunked", trained_memory(1), 512),
    Case("miras, MLP memory", "B1 H4 D64 C16", "recurrent", "chunked", trained_memory(2), 512),
    Case("plstm, J=4", "B1 H4 K128 V128", "recurrent", "chunked", turned(4), 2048),
    Case("rat", "B1 H4 D64 L16", "recurrent", "chunked", chunk_attention, 512),
]


def seconds(case: Case, length: int, backend: str, repeats: int) -> float:
    """Return the median time of a forward and a backward pass, after a warm-up."""
    wanted, call = case.make(length)
    for tensor in wanted:
        tensor.requires_grad_()
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        output = call(backend)[0]
        torch.autograd.grad(output.sum(), wanted)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def _peak_bytes() -> int:
    """Return the peak of this process's memory; getrusage would inherit the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _peak(backend: str, length: int, results: Any) -> None:
    torch.set_num_threads(1)
    for warm_up in (True, False):
        wanted, call = matrix_rnn(64 if warm_up else length)
        for tensor in wanted:
            tensor.requires_grad_()
        before = _peak_bytes()
        torch.autograd.grad(call(backend)[0].sum(), wanted)
    results.put(_peak_bytes() - before)


def memory() -> None:
    """Print a fresh process's growth of peak memory in one forward and backward pass of M2RNN."""
    context = multiprocessing.get_context("spawn")
    every_state = 4 * 16 * 64 * 16
    # Inputs' gradients, the output and its gradient, of a token: what any form must hold.
    sizes = [sum(t.numel() for t in matrix_rnn(length)[0]) for length in (1, 2)]
    unavoidable = 4 * (sizes[1] - sizes[0] + 2 * 16 * 16)
    print(
        f"\n{'m2rnn memory':<14} {'T':>5} {'every state':>12} {'peak growth':>12} {'share':>6} "
        f"{'without gradients and output':>29} {'share':>6}"
    )
    for backend, length in (("recurrent", 2048), ("checkpointed", 2048), ("checkpointed", 8192)):
        results = context.SimpleQueue()
        process = context.Process(target=_peak, args=(backend, length, results))
        process.start()
        process.join()
        peak, states = results.get(), every_state * length
        net = peak - unavoidable * length
        print(
            f"{backend:<14} {length:>5} {states / 1e6:>9.0f} MB {peak / 1e6:>9.0f} MB "
            f"{peak / states:>6.3f} {net / 1e6:>26.0f} MB {net / states:>6.3f}"
        )


def against_newton() -> None:
    """Print ParaRNN by shooting against Newton's method for all positions, in turns."""
    print(f"\n{'op':<10} {'shape':<12} {'newton ms':>10} {'shooting ms':>12} {'ratio':>6}")
    for op, cell in (("gru", ParaGRU), ("lstm", ParaLSTM)):
        for batch, length, dim in ((1, 4096, 256), (4, 512, 256), (8, 2048, 64), (2, 1024, 384)):
            wanted, call = para(op, batch, dim)(length)
            for tensor in wanted:
                tensor.requires_grad_()
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(8):
                for shooting in (False, True):
                    cell.shooting = shooting
                    start = time.perf_counter()
                    torch.autograd.grad(call("newton")[0].sum(), wanted)
                    times[shooting].append((time.perf_counter() - start) * 1e3)
            newton, shot = (sorted(times[way][1:])[3] for way in (False, True))
            print(
                f"para_{op:<5} {f'{batch}x{length}x{dim}':<12} {newton:>10.1f} {shot:>12.1f} "
                f"{newton / shot:>5.2f}x",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--against-newton", action="store_true", help="only ParaRNN by shooting and by Newton"
    )
    parser.add_argument("--only", nargs="*", help="cases whose name contains one of these")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if arguments.against_newton:
        against_newton()
        return
    print(
        f"{'op':<36} {'shape':<16} {'T':>5} {'definition s':>13} {'fast s':>8} {'tokens/s':>9} "
        f"{'ratio':>7} {'growth':>7}"
    )
    found: dict[tuple[str, str, int], float] = {}
    for case in CASES:
        if arguments.only and not any(part in case.name for part in arguments.only):
            continue
        for length in LENGTHS:
            fast = seconds(case, length, case.fast, 7 if length <= 2048 else 3)
            found[case.name, case.shape, length] = fast
            slow, ratio, growth = "-", "-", ""
            if length <= case.longest_definition:
                definition = seconds(case, length, case.definition, 3)
                slow, ratio = f"{definition:.3f}", f"{definition / fast:.1f}x"
            if length == LENGTHS[-1]:
                before = found[case.name, case.shape, LENGTHS[-2]]
                growth = f"{math.log(fast / before) / math.log(LENGTHS[-1] / LENGTHS[-2]):.2f}"
            batch = int(case.shape[1 : case.shape.index(" ")])
            print(
                f"{case.name:<36} {case.shape:<16} {length:>5} {slow:>13} {fast:>8.4f} "
                f"{batch * length / fast:>9,.0f} {ratio:>7} {growth:>7}",
                flush=True,
            )
    gdn, product = ([found.get((c.name, c.shape, n)) for n in LENGTHS] for c in CASES[:2])
    pairs = [f"{n}: {g / p:.2f}" for n, g, p in zip(LENGTHS, gdn, product, strict=True) if g and p]
    if pairs:
        print("\nspeed of delta_product n=2 as a share of gdn's at T =", ", ".join(pairs))
    memory()


if __name__ == "__main__":
    main()
