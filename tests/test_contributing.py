"""docs/contributing.md, followed to the letter in a copy of the project."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.data.manifest import Manifest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/contributing.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def changes():
    """Yield the language, the file and the text of each block: the file is what is named last
    before it."""
    for block in BLOCK.finditer(PAGE):
        named = re.findall(r"`([\w/]+\.\w+)`", PAGE[: block.start()])
        yield block[1], named[-1], block[2]


def follow(folder: Path) -> list[str]:
    """Save the files, make the changes, and return the commands."""
    commands = []
    for language, name, text in changes():
        path = folder / name
        if language == "bash":
            commands += text.strip().splitlines()
        elif language == "diff":
            before = "".join(x[1:] for x in text.splitlines(True) if not x.startswith("+"))
            after = "".join(x[1:] for x in text.splitlines(True) if not x.startswith("-"))
            assert before in path.read_text()
            path.write_text(path.read_text().replace(before, after))
        elif path.exists():
            path.write_text(f"{path.read_text()}\n\n{text}")
        else:
            path.write_text(text)
    return commands


def test_every_file_that_the_page_names_exists_or_is_made_by_it():
    made = {name for _, name, _ in changes()}
    for name in re.findall(r"`((?:pretrain|data_prep|evals|docs)/[\w/]+\.\w+)`", PAGE):
        assert name in made or (ROOT / name).is_file(), name


@pytest.mark.slow
def test_the_page_works(tmp_path, corpus):
    pytest.importorskip("lm_eval")
    for name in ("data_prep", "evals", "pretrain", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    (tmp_path / "data").mkdir()
    shutil.copytree(corpus, tmp_path / "data/stdlib")
    touched = {p: p.read_text() for p in tmp_path.rglob("*.py")}
    commands = follow(tmp_path)
    # Of the files that were there, only those that the table promises.
    changed = {p.relative_to(tmp_path).as_posix() for p, t in touched.items() if p.read_text() != t}
    assert changed == {
        "pretrain/config/optimizer.py",
        "pretrain/config/schedule.py",
        "pretrain/checkpoint/storage.py",
    }

    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in commands:
        done = subprocess.run(
            [sys.executable, *shlex.split(command)[1:]],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    run = tmp_path / "runs/lion"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "lr" in row]
    expected = [3e-4 * math.sqrt(1 / max(step, 1)) for step in (1, 2, 3)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)
    assert all(row["largest_weight"] > 0 for row in rows)
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert (checkpoint / "rank-0.pt").is_file() and not (checkpoint / ".metadata").exists()
    poems = Manifest.load(tmp_path / "data/poems")
    assert sum(shard.documents for shard in poems.shards) == 2
    (scores,) = [p for p in (run / "evals").rglob("*.json") if "count_on" in p.read_text()]
    assert "contains" in scores.read_text()
