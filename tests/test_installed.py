"""The project installed as a wheel, and used from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "data_prep", "evals", "launch", "pretrain")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Install the wheel into a new environment; return its interpreter.

    The environment has the dependencies of the one that runs the tests, but not the project's
    editable install: a path in a .pth file does not bring the .pth files that lie there.
    """
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, source], folder)
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    _run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], folder)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(_run([python, "-c", purelib], folder).strip())
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _run(command, folder):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_commands_of_the_readme_work_in_an_empty_folder(python, tmp_path):
    where = _run([python, "-c", "import pretrain; print(pretrain.__file__)"], tmp_path)
    assert "site-packages" in where and str(ROOT / "pretrain") not in where

    model = "configs/models/410m/gdn-hybrid-3to1.yaml"
    by_default = _run([python, "-m", "pretrain", "plan", model, "--devices", "8"], tmp_path)
    assert "H100" in by_default
    named = [python, "-m", "pretrain", "plan", model, "--devices", "8", "--hardware", "h200"]
    assert "H200" in _run(named, tmp_path)

    small = ["tokenizer.vocab_size=512", "tokenizer.sample_bytes=200000"]
    _run([python, "-m", "data_prep", "configs/data/stdlib.yaml", *small], tmp_path)
    short = ["train.steps=3", "schedule.warmup_steps=1", "validation.tokens=2048"]
    _run([python, "-m", "pretrain", "configs/runs/demo.yaml", *short], tmp_path)
    _run([python, "-m", "evals", "runs/demo", "--max-tokens", "2000"], tmp_path)

    run = tmp_path / "runs" / "demo"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("step", 0) for row in rows) == 3
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["hybrid-pretrain"] is not None
    assert environment["git_commit"] is None
    assert list((run / "evals").glob("*.json"))
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs"}


def test_the_slurm_script_is_made_in_an_empty_folder(python, tmp_path):
    command = [python, "-m", "launch", "configs/grids/hybrid-ratio-tiny.yaml", "--dry-run"]
    printed = _run([*command, "--cluster", "slurm-cpu", "parallel.micro_batch_size=4"], tmp_path)
    assert "#SBATCH" in printed
    assert not list(tmp_path.iterdir())
