"""The optimizer's state in files on a disk (ZeRO-3 of DeepSpeed)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pretrain.common.errors import UserError
from pretrain.config import ParallelConfig
from pretrain.optim.backends.offload_folder import make_offload_folder
from tests.helpers.processes import run, run_on


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_state_in_files_trains_and_resumes_as_in_memory(processes, tmp_path):
    """One process with no launcher; DeepSpeed asks the environment for what one sets."""
    if processes == 1:
        done = run("tests.helpers.offload_worker", tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        output = done.stdout
    else:
        output = run_on(2, "tests.helpers.offload_worker", tmp_path)
    line = next(x for x in output.splitlines() if x.startswith("RESULT"))
    results = json.loads(line.removeprefix("RESULT"))
    left = results.pop("left")
    assert left == [] or processes == 2, "other libraries would take it for a launcher's"
    for dtype, found in results.items():
        assert found["moved"] > 1e6
        for step, expected in zip(found["memory"], found["plain"], strict=False):
            np.testing.assert_allclose(step, expected, rtol=1e-5)
        # A norm's last digit decides how some bf16 weight is rounded, by up to 2^-8.
        close = 1e-5 if dtype == "torch.float32" else 1e-2
        np.testing.assert_allclose(found["files"], found["memory"], rtol=close, err_msg=dtype)
        for name, source in (
            ("files from memory", "memory"),
            ("memory from files", "files"),
            ("memory rolled back", "memory"),
            ("files rolled back", "files"),
        ):
            expected = found[source][2:]
            np.testing.assert_allclose(found[name], expected, rtol=close, err_msg=f"{dtype} {name}")
        assert not list((tmp_path / dtype / "files").iterdir()), "removed when the process ends"


def test_what_killed_processes_leave_is_removed(tmp_path, monkeypatch):
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder
    monkeypatch.setattr(builder, "is_compatible", lambda self, verbose=False: True)
    parallel = ParallelConfig(
        zero_stage=3, zero_backend="deepspeed", offload="nvme", offload_path=str(tmp_path)
    )
    (tmp_path / "optimizer-dead").mkdir()
    (tmp_path / "optimizer-dead" / "moments").write_text("1")
    (tmp_path / "optimizer-dead.lock").touch()
    alive = make_offload_folder(parallel, 10)
    assert not (tmp_path / "optimizer-dead").exists()
    assert make_offload_folder(parallel, 10) != alive
    assert alive.is_dir()
    assert len(list(tmp_path.iterdir())) == 4


def test_what_files_need_is_said(tmp_path, monkeypatch):
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder
    parallel = ParallelConfig(
        zero_stage=3, zero_backend="deepspeed", offload="nvme", offload_path=str(tmp_path / "x")
    )
    monkeypatch.setattr(builder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(UserError, match="apt install libaio-dev"):
        make_offload_folder(parallel, 10)
    monkeypatch.setattr(builder, "is_compatible", lambda self, verbose=False: True)
    with pytest.raises(UserError, match=r"GB are free, expected at least 1600000000\.0 GB"):
        make_offload_folder(parallel, 10**17)
    assert not list((tmp_path / "x").iterdir())
    (tmp_path / "x").rmdir()
    (tmp_path / "x").write_text("a file")
    with pytest.raises(UserError, match=r"offload_path: .*x: cannot be written"):
        make_offload_folder(parallel, 10)
