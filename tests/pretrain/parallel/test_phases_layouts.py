"""Two processes train runs in phases as one does, under every backend and layout."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.common.config_loader import to_yaml
from pretrain.training.trainer import Trainer
from tests.helpers import phases_worker
from tests.helpers.phased_runs import configured, rows, three_phases
from tests.helpers.processes import run_on
from tests.helpers.training_run import Run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("processes")]
DEEPSPEED = {"zero_backend": "deepspeed"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "context": {"context": 2},
    "data": {},
    "pipeline": {"pipeline": 2},
    "tensor": {"tensor": 2, "sequence": True},
    "zero0": {**DEEPSPEED, "zero_stage": 0},
    "zero1-pipeline": {**DEEPSPEED, "zero_stage": 1, "pipeline": 2},
    "zero2": {**DEEPSPEED, "zero_stage": 2},
    "zero2-offload": {**DEEPSPEED, "zero_stage": 2, "offload": "cpu"},
    "zero3": {**DEEPSPEED, "zero_stage": 3},
    "zero3-tensor": {**DEEPSPEED, "zero_stage": 3, "tensor": 2},
    "packed-context": {"context": 2},
    "packed-zero3": {**DEEPSPEED, "zero_stage": 3},
    "carried-data": {},
    "carried-pipeline": {"pipeline": 2},
}
KINDS = ("one", "packed", "carried")


def configuration(run, other, name):
    """The settings of the run of a name: what it is, and its layout if it has one."""
    config = configured(run, three_phases(other))
    config.checkpoint.every = 1 if name == "context" else 100
    config.validation.every = 4
    config.directory = str(run.directory.with_name(name))
    kind, _, _ = name.partition("-")
    if kind == "packed":
        config.data.packing = "best_fit"
    if kind == "carried":
        config.train.carry_state, config.train.carry_steps = True, 2
        config.model.pattern = "gdn gdn"
    for key, value in LAYOUTS.get(name, {}).items():
        setattr(config.parallel, key, value)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus, other_corpus):
    """The runs by one process, and those of every layout by two."""
    path = tmp_path_factory.mktemp("phases")
    run = Run(path, corpus, "run")
    for name in KINDS:
        Trainer(configuration(run, other_corpus, name)).fit()
    settings = path / "settings"
    settings.mkdir()
    for name in LAYOUTS:
        text = to_yaml(configuration(run, other_corpus, name))
        (settings / f"{name}.yaml").write_text(text)
    run_on(2, phases_worker.__name__, settings)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_phases_are_the_same_under_every_layout(folder, layout):
    kind, _, _ = layout.partition("-")
    expected = rows(folder / (kind if kind in KINDS else "one"))
    assert [r["phase"] for r in expected if "loss" in r] == [1, 1, 1, 2, 2, 2, 3, 3]
    for one, two in zip(expected, rows(folder / layout), strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            wanted = value if isinstance(value, str) else pytest.approx(value, rel=2e-4)
            assert two[key] == wanted, (one["step"], key)


def test_context_parallel_runs_go_on_bit_for_bit_from_every_step(folder):
    whole = rows(folder / "context")
    for step in range(1, 8):
        found = [r for r in rows(folder / f"context-step-0000000{step}") if r["step"] > step]
        assert found == [r for r in whole if r["step"] > step], step
        assert [r["step"] for r in found if "loss" in r] == list(range(step + 1, 9))
