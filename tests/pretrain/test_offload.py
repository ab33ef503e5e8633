"""The optimizer's state in files on a disk (ZeRO-3 of DeepSpeed)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from pretrain.config import ParallelConfig
from pretrain.parallel.deepspeed_updates import folder_for_files

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_state_in_files_trains_and_resumes_as_in_memory(tmp_path):
    """On one process that no launcher started; DeepSpeed asks the environment for what one sets."""
    environment = {k: v for k, v in os.environ.items() if "RANK" not in k and k != "WORLD_SIZE"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretrain.offload_worker", str(tmp_path)], cwd=ROOT,
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    results = json.loads(line.removeprefix("RESULT"))
    assert results.pop("left") == [], "other libraries would take it for a launcher's"
    for dtype, found in results.items():
        assert found["moved"] > 1e6
        for step, expected in zip(found["memory"], found["plain"], strict=False):
            np.testing.assert_allclose(step, expected, rtol=1e-5)
        for name, steps in (("files", 4), ("files from memory", 2), ("memory from files", 2)):
            expected = np.array(found["memory"][-steps:])
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=f"{dtype} {name}")
        assert not list((tmp_path / dtype / "files").iterdir()), "removed when the process ends"


def test_what_files_need_is_said(tmp_path, monkeypatch):
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder
    parallel = ParallelConfig(
        zero_stage=3, zero_backend="deepspeed", offload="nvme", offload_path=str(tmp_path / "x")
    )
    monkeypatch.setattr(builder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(UserError, match="apt install libaio-dev"):
        folder_for_files(parallel)
    monkeypatch.setattr(builder, "is_compatible", lambda self, verbose=False: True)
    (tmp_path / "x").write_text("a file")
    with pytest.raises(UserError, match=r"offload_path: .*x: cannot be written"):
        folder_for_files(parallel)
