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
    table, steps, para_rnn = done.stdout.split("\n\n")
    rows = [line for line in table.splitlines() if " forward " in line or " backward " in line]
    assert len(rows) == 2 * len({line[:20] for line in rows}) >= 26
    for row in rows:
        registers, spilled, shared = (int(x.replace(",", "")) for x in row[36:64].split())
        assert 0 < registers <= 255, row
        assert spilled < 300, row
        assert shared <= 227 * 1024, row

    # M2RNN's blocks, ParaRNN's choice between steps and shooting, and plans go by these numbers.
    from pretrain.ops.m2rnn import kernels as m2rnn
    from pretrain.ops.para_rnn.kernels import INSTRUCTIONS

    for row in steps.splitlines()[1:]:
        way, _, block, found = row[20:].split()
        if row.startswith("m2rnn 64x16"):
            known = m2rnn.INSTRUCTIONS[way == "backward"][int(block.split("x")[0])]
            assert float(found) == pytest.approx(known, rel=0.05), (
                f"pretrain/ops/m2rnn/kernels.py: INSTRUCTIONS says {known}, compiled: {row}"
            )
    for row in para_rnn.splitlines()[1:]:
        op, which, way, *_ = row.split()
        if which == "one":
            continue
        lanes, ratio = float(row[38:50]), float(row[71:])
        counted = INSTRUCTIONS[op, "backward" if way == "backward" else which]
        assert lanes / 32 == pytest.approx(counted, rel=0.05), (
            f"pretrain/ops/para_rnn/kernels.py: INSTRUCTIONS says {counted}, compiled: {row}"
        )
        assert ratio < (2.2 if way == "backward" else 3.6), row
