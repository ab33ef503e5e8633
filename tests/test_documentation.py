"""The commands of README and docs run, in a copy of the project, in the order of the pages."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.helpers import processes
from tests.helpers.browser import CHROMIUM

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/data.md",
    "docs/training.md",
    "docs/observing.md",
    "docs/long-context.md",
    "docs/planner.md",
    "docs/phases.md",
    "docs/distill.md",
    "docs/launching.md",
    "docs/decide.md",
    "docs/evaluation.md",
    "docs/depth.md",
    "docs/exits.md",
    "docs/convert.md",
    "docs/scaling.md",
    "docs/laptop-to-cluster.md",
    "docs/reproduce-a-table.md",
]
# What a reader does first is always tested; the rest is slow.
FIRST = ("README.md", "docs/data.md")
# Whose commands have a test of their own, or which have none.
OTHERS = {
    "docs/claims.md",
    "docs/add-a-layer.md",
    "docs/contributing.md",
    "docs/index.md",
    "docs/layers.md",
    "docs/parallel.md",
    "docs/settings.md",
    "docs/library.md",
    "docs/scaling-library.md",
}
COPIED = ("configs", "data_prep", "evals", "launch", "pretrain", "tests/data", "benchmarks/data")
SCRIPTS = ("benchmarks/observing_pictures.py",)
PICTURES = "runs/pictures"  # where a page's commands make its pictures of docs/pictures


def commands(page):
    """Lines of the page's ``bash`` blocks; those marked ``bash gpu``, ``slurm`` or ``hub`` need
    what is not here."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


@pytest.fixture(scope="module")
def project(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("project")
    for name in COPIED:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder / name)
    (folder / "data").mkdir()
    shutil.copytree(corpus, folder / "data/stdlib")
    # A run to score: make demo's, but short.
    run(
        folder,
        "python -m pretrain configs/runs/demo.yaml train.steps=2 schedule.warmup_steps=1 "
        "sample.tokens=0",
    )
    return folder


def run(folder, command, *, interpreter=False):
    """In an interpreter of its own, or quicker, see tests/helpers/processes.py."""
    words = shlex.split(command)
    assert words[0] in ("python", "torchrun"), command
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", *words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    if interpreter or words[1] != "-m":
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=folder,
            text=True,
            capture_output=True,
            check=False,
            timeout=300,
            env=environment,
        )
    else:
        done = processes.run(*words[2:], folder=folder, environment=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_every_page_is_known_and_reachable():
    pages = {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")}
    assert pages == (set(PAGES) | OTHERS) - {"README.md"}
    listed = set(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert listed == {p.removeprefix("docs/") for p in pages}
    for page in [*PAGES, *OTHERS]:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
        # A command outside a block is no command that anyone runs; inside, it is run.
        fences = re.findall(r"^```(\S*.*)$", text, re.MULTILINE)
        assert set(fences) <= {
            "",
            "bash",
            "bash gpu",
            "bash slurm",
            "bash hub",
            "yaml",
            "python",
            "diff",
        }, page


@pytest.mark.parametrize("page", PAGES)
def test_what_needs_gpus_says_so(page):
    lines = (ROOT / page).read_text().splitlines()
    for number, line in enumerate(lines):
        needed = {
            "```bash gpu": "needs gpus",
            "```bash slurm": "needs slurm",
            "```bash hub": "needs a network",
        }.get(line)
        assert needed is None or needed in " ".join(lines[number - 4 : number]).lower(), page


@pytest.mark.parametrize(
    "page", [p if p in FIRST else pytest.param(p, marks=pytest.mark.slow) for p in PAGES]
)
def test_the_commands_of_a_page(page, project):
    for command in commands(page):
        run(project, command, interpreter=page == "docs/data.md")
    for name in re.findall(r"\]\(pictures/(.*?)\)", (ROOT / page).read_text()):
        of_a_page = "-watch" in name or "-report" in name
        if CHROMIUM is not None or not of_a_page:
            check_picture(project / PICTURES / name, ROOT / "docs/pictures" / name)


def check_picture(made, shown):
    """It was made, is as wide as the page shows it, and is not empty."""
    with Image.open(made) as picture, Image.open(shown) as expected:
        assert picture.width == expected.width, made.name
        colors = picture.convert("RGB").getcolors(1 << 24)
        assert colors is not None, made.name
        counts = sorted(n for n, _ in colors)
        assert sum(counts[:-1]) > 0.02 * picture.width * picture.height, made.name
    assert shown.stat().st_size < 100_000, shown.name
