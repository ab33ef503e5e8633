"""JSON without NaN, and names of files that no two names share."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from pretrain.common.files import file_name, write_json
from tests.helpers.nasty_names import random_names


def test_numbers_that_are_not_finite_are_null(tmp_path):
    values = {"a": [1.5, math.nan, (math.inf, 2)], "b": {"c": np.float64("-inf"), "d": "nan"}}
    write_json(tmp_path / "a.json", values)
    found = json.loads(
        (tmp_path / "a.json").read_text(), parse_constant=lambda word: f"invalid {word}"
    )
    assert found == {"a": [1.5, None, [None, 2]], "b": {"c": None, "d": "nan"}}


def test_two_names_never_share_a_file(tmp_path):
    bases = [*random_names(100), "l-x", "l/x", "/l/x", "l%2Fx", "l x", "..", ".", ".a", "%2Ea"]
    long = ["x" * 400, "x" * 399 + "y", "/" * 200]
    names = list(dict.fromkeys([*bases, *long]))
    files = [file_name(name) for name in names]
    assert len({file.lower() for file in files}) == len(names)
    for file in files:
        (tmp_path / f"{file}-step-00000012-0123abcd.json").write_text("x")
    assert len(list(tmp_path.iterdir())) == len(names)
    assert all(Path(file).name == file for file in files)


def test_usual_names_stay():
    for name in ("hellaswag", "passkey@1024", "my-task_2.0", "SmolLM2-135M"):
        assert file_name(name) == name
