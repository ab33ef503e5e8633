"""Compile every Triton kernel for a GPU that need not be present: registers, spills, instructions.

    python -m benchmarks.kernels_compiled [--arch 90]

Needs only triton, no GPU: the ops are called on the meta device, and the kernels that they would
launch are compiled for compute capability ARCH and read back with cuobjdump. `spilled`: bytes of a
thread's stack; `shared`: bytes of a program, at most 227 KB on Hopper; instructions are counted
over the entire kernel, `tanh` the MUFU ones, `tensor` the tensor-core products. Shapes are those of
the 410M models, in bfloat16.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import compiled_loops
from pretrain.ops import m2rnn, para_gru, para_lstm, rnn
from pretrain.ops.m2rnn import kernels as m2rnn_kernels
from pretrain.ops.para_rnn import kernels as para_rnn_kernels
from pretrain.ops.rnn import kernels as rnn_kernels
from pretrain.ops.rnn.cells import CELLS
from pretrain.ops.shared.planning import planned_device

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def calls() -> dict[str, Any]:
    """Return calls of the ops by name and shape."""
    wide, tokens = torch.float32, 4096
    eight = torch.arange(9) * tokens  # lengths must be known

    def matrix(key_dim: int, value_dim: int, heads: int, rows: int) -> Tensor:
        total = rows * tokens
        return m2rnn(
            empty(1, total, 1, key_dim),
            empty(1, total, 1, key_dim),
            empty(1, total, heads, value_dim),
            empty(heads, value_dim, value_dim),
            empty(1, total, heads, dtype=wide),
            cu_seqlens=eight[: rows + 1],
            state_grad_clip=1.0,
        )[0]

    def classical(cell: str, dim: int, rows: int) -> Tensor:
        kind, heads = CELLS[cell], 1024 // dim
        x = empty(1, rows * tokens, kind.gates, heads, dim)
        weight = empty(heads, dim, kind.gates, dim)
        bias = empty(kind.biases, heads, dim, dtype=wide)
        starts = torch.arange(rows + 1) * tokens
        return rnn(x, weight, bias, cell=cell, cu_seqlens=starts, state_grad_clip=1.0)[0]

    a, c, bias = (empty(n, 1024, dtype=wide) for n in (3, 2, 3))

    def para(op: str, rows: int, backend: str) -> Tensor:
        u, starts = empty(1, rows * tokens, 3, 1024), torch.arange(rows + 1) * tokens
        if op == "para_gru":
            return para_gru(u, a, bias, cu_seqlens=starts, backend=backend)[0]
        return para_lstm(u, a, c, bias, cu_seqlens=starts, backend=backend)[0]

    return {
        **{
            f"m2rnn {k}x{v}{', one row' * (n == 1)}": lambda k=k, v=v, h=h, n=n: matrix(k, v, h, n)
            for k, v, h, n in (
                (64, 16, 84, 8),
                (64, 16, 84, 1),
                (64, 64, 16, 8),
                (128, 128, 8, 8),
                (64, 256, 4, 8),
            )
        },
        **{
            f"{op} {kind}": lambda op=op, rows=rows, backend=backend: para(op, rows, backend)
            for op in ("para_gru", "para_lstm")
            for kind, rows, backend in (
                ("shooting", 8, "triton_shooting"),
                ("one row", 1, "triton_shooting"),
                ("steps", 8, "triton_steps"),
            )
        },
        **{
            f"{cell} D={d}{', 64 rows' * (n == 64)}": lambda cell=cell, d=d, n=n: classical(
                cell, d, n
            )
            for cell in CELLS
            for d, n in ((64, 8), (64, 64), (128, 8), (256, 8))
        },
    }


def launches(call: Any) -> list[Launch]:
    """Return the launches of one forward and one backward pass, each kernel once."""
    found: list[Launch] = []

    def record(kernel: Any, grid: Any, work: Any, *arguments: Any, **options: Any) -> None:
        if all(kernel is not known for known, *_ in found):
            found.append((kernel, arguments, options))

    modules: list[Any] = [m2rnn_kernels, para_rnn_kernels, rnn_kernels]
    kept = [module.launch for module in modules]
    try:
        for module in modules:
            module.launch = record
        with planned_device("cuda"):
            call().sum().backward()
    finally:
        for module, launch in zip(modules, kept, strict=True):
            module.launch = launch
    return found


def compiled(launch: Launch, arch: int) -> Any:
    """Compile as ``kernel[grid](*arguments, **options)`` would for compute capability ``arch``."""
    kernel, arguments, options = launch
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    signature, constants, card = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given.pop(parameter.name)
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            card[(index,)] = [["tt.divisibility", 16]]
        elif parameter.do_not_specialize:
            signature[parameter.name] = "i32"
        elif parameter.is_constexpr or (isinstance(value, int) and value == 1):
            # A number that is 1 is a constant to kernels compiled when they are called.
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                card[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, card)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=given)


def counted(kernel: Any) -> tuple[dict[str, int], str]:
    """Return a compiled kernel's registers, bytes on the stack, shared memory and instructions.

    With them comes its machine code, as cuobjdump lists it.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        )
    sizes = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout))
    pattern = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)"
    operations = collections.Counter(re.findall(pattern, code.stdout, re.MULTILINE))
    counts = {
        "registers": int(sizes["REG"]),
        "spilled": int(sizes["STACK"]),
        "shared": kernel.metadata.shared,
        "instructions": operations.total(),
        "tanh": operations["MUFU"],
        "tensor": operations["HMMA"] + operations["HGMMA"],
    }
    return counts, code.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for Hopper")
    parser.add_argument("--only", nargs="*", help="ops whose name contains one of these")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET is 1: kernels are interpreted then, expected it unset")
    print(f"triton {triton.__version__}, torch {torch.__version__}, sm_{arguments.arch}, bfloat16")
    header = f"{'op':<20} {'pass':<9} {'warps':>5} {'registers':>9} {'spilled':>8} {'shared':>8}"
    print(f"{header} {'instructions':>12} {'tanh':>5} {'tensor':>6} {'seconds':>8}")
    rows: list[str] = []
    para_rows: list[str] = []
    for name, call in calls().items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        for launch, which in zip(launches(call), ("forward", "backward"), strict=True):
            start = time.perf_counter()
            kernel = compiled(launch, arguments.arch)
            seconds = time.perf_counter() - start
            found, code = counted(kernel)
            if name.startswith("para"):
                para_rows.append(compiled_loops.row(name, which, code, launch[2]))
            elif not {"BLOCK_C", "BLOCK_FROM"} & set(launch[2]):  # loops over tiles in a token
                rows.append(compiled_loops.of_steps(name, which, code, launch[2]))
            print(
                f"{name:<20} {which:<9} {launch[2]['num_warps']:>5} {found['registers']:>9} "
                f"{found['spilled']:>8} {found['shared']:>8,} {found['instructions']:>12,} "
                f"{found['tanh']:>5} {found['tensor']:>6} {seconds:>8.1f}",
                flush=True,
            )
    for title, lines in ((compiled_loops.STEPS_HEADER, rows), (compiled_loops.HEADER, para_rows)):
        if lines:
            print("\n".join(["", title, *lines]))


if __name__ == "__main__":
    main()
