"""docs/add-a-layer.md, followed to the letter in a copy of the project."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/add-a-layer.md").read_text()


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_page_works(tmp_path, corpus):
    for name in ("data_prep", "evals", "pretrain", "tests", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copytree(corpus, tmp_path / "data/stdlib")

    (target,) = re.findall(r"Save as `(.*?)`", PAGE)
    (code,) = blocks("python")
    (tmp_path / target).write_text(code)
    (diff,) = blocks("diff")
    before = "".join(x[1:] for x in diff.splitlines(True) if not x.startswith("+"))
    after = "".join(x[1:] for x in diff.splitlines(True) if not x.startswith("-"))
    registry = tmp_path / "pretrain/nn/mixers/__init__.py"
    assert before in registry.read_text()
    registry.write_text(registry.read_text().replace(before, after))

    # Whatever options the tests run with, pytest inside is the page's own.
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    environment["PYTHONPATH"] = str(tmp_path)
    (commands,) = blocks("bash")
    outputs = []
    for command in commands.strip().splitlines():
        done = subprocess.run(
            [sys.executable, *shlex.split(command)[1:]],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    passed = int(re.findall(r"(\d+) passed", outputs[0])[0])
    assert passed >= 20
    assert "step 2/2" in outputs[1]
    assert "| `leaky_average` | leaky average |" in outputs[2]
