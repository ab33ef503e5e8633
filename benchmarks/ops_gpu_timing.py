"""The clock of benchmarks/ops_gpu.py, and the least time that an op can take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops_gpu_cases import Run


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


def floors(
    wanted: list[Tensor], output: Tensor, flops: float, states: int, copy: float, product: float
) -> Any:
    """Return the least milliseconds of a forward pass, and of a forward and a backward pass."""
    read, written = sum(t.nbytes for t in wanted), output.nbytes
    forward = max((read + written) / copy, flops / product)
    kept = max((read + max(states, 1) * written) / copy, flops / product)
    backward = max((2 * read + (1 + states) * written) / copy, 2 * flops / product)
    return 1e3 * forward, 1e3 * (kept + backward)
