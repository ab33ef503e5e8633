"""docs/layers.md: in step with the registry, its example true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pretrain.nn.mixers.__main__ import page
from pretrain.ops import newton_recurrence
from tests.helpers.relative_error import relative_error

PAGE = Path(__file__).parents[3] / "docs" / "layers.md"


def test_the_page_is_the_registry():
    assert PAGE.read_text() == page(), "run: python -m pretrain.nn.mixers > docs/layers.md"


def test_the_example_runs_and_is_right(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 20
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert "fallbacks=0" in capsys.readouterr().out
    x, parameters = scope["x"], scope["parameters"]
    stepped, _ = newton_recurrence(scope["cell"], x, parameters, backend="sequential")
    assert relative_error(scope["states"], stepped) < 1e-6
    (expected,) = torch.autograd.grad(stepped.square().sum(), x)
    assert relative_error(x.grad, expected) < 1e-4
