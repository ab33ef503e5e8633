"""What tests share lives in tests/helpers, so that each file of tests stands alone."""

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
