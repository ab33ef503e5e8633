"""A model that is larger than the memory is refused by what does not fit."""

from __future__ import annotations

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.model import build
from tests.helpers.small_model import settings

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "


@pytest.mark.parametrize(
    "error", [RuntimeError(f"{CPU}you tried"), torch.OutOfMemoryError("CUDA out of memory. Tried")]
)
def test_what_does_not_fit_is_named_with_its_size(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(build, "fill_parameters", fail)
    rows, width = 10_000_000, settings().hidden_size
    words = rf"embedding of the model has {rows * width * 4 / 1e9:,.1f} GB of weights, more than"
    with pytest.raises(UserError, match=words):
        next(build.fill_units(meta(rows), 0))


def test_other_errors_pass(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(build, "fill_parameters", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        next(build.fill_units(meta(128), 0))


def meta(rows: int) -> build.LanguageModel:
    with torch.device("meta"):
        return build.LanguageModel(settings(), rows, build.current_context(torch.float32))
