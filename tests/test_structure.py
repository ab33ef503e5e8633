"""What tests share lives in tests/helpers; files are read as data, never as code."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_only_helpers_are_imported_from_the_tests():
    """Also in the text of programs that tests start."""
    paths = [*TESTS.rglob("*.py"), *(TESTS.parent / "benchmarks").rglob("*.py")]
    found = [
        f"{path.relative_to(TESTS.parent)}: {line.strip()}"
        for path in paths
        for line in path.read_text().splitlines()
        if re.search(r"(from|import) +tests[.](?!helpers)|from +tests +import +(?!helpers)", line)
    ]
    assert not found


def test_no_reader_runs_what_a_file_names():
    """Ruff refuses pickle and unsafe YAML (S301, S302, S506); these it does not know."""
    unsafe = re.compile(r"weights_only=False|allow_pickle=True|read_pickle|joblib|cloudpickle")
    found = [
        f"{path.relative_to(TESTS.parent)}: {line.strip()}"
        for package in ("pretrain", "data_prep", "launch", "evals")
        for path in (TESTS.parent / package).rglob("*.py")
        for line in path.read_text().splitlines()
        if unsafe.search(line)
    ]
    assert not found


def test_slow_tests_are_marked_as_such_in_their_own_files():
    """Check that helpers have no mark: of ``-m slow`` tests/conftest.py leaves out such files."""
    others = [p for p in TESTS.rglob("*.py") if not p.name.startswith("test_")]
    assert [p.name for p in others if "mark.slow" in p.read_text()] == ["conftest.py"]
