"""Every kernel compiles for Hopper, which needs no GPU: the interpreter takes more than the
compiler does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_and_fits():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels_compiled.py"],
        check=False,
        text=True,
        capture_output=True,
        env=environment | {"PYTHONPATH": "."},
    )
    assert done.returncode == 0, done.stderr
    rows = [
        line for line in done.stdout.splitlines() if " forward " in line or " backward " in line
    ]
    assert len(rows) == 2 * len({line[:20] for line in rows}) >= 26
    for row in rows:
        registers, spilled, shared = (int(x.replace(",", "")) for x in row[36:64].split())
        assert 0 < registers <= 255, row
        assert spilled < 300, row
        assert shared <= 227 * 1024, row
