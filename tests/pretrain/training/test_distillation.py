"""Learning from a teacher, and frozen parameters: the same under every layout."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pretrain.config import ParallelConfig
from pretrain.parallel.processes import start_processes
from tests.helpers import distillation_worker
from tests.helpers.distillation_worker import (
    ALIGNED,
    CASES,
    ROWS,
    STEPS,
    train,
    write_teacher,
)
from tests.helpers.processes import run_on
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    start_processes()
    found = tmp_path_factory.mktemp("distillation")
    write_teacher(found / "teacher")
    write_teacher(found / "padded", rows=distillation_worker.PADDED_ROWS)
    return found


@pytest.fixture(scope="module")
def alone(folder):
    """Results of one process, by model; each is trained once."""
    found = {}

    def result(model):
        if model not in found:
            found[model] = train(model, ParallelConfig(zero_stage=0), folder / "teacher")
        return found[model]

    return result


def learning_first(changed):
    """The parameters that alignment may change."""
    return {name for name in changed if name.split(".")[2:3] == ["mixer"]}


@pytest.mark.parametrize("model", ["converted", "untied", "muon", "experts"])
def test_alignment_trains_new_mixers_alone_then_everything_learns(alone, model):
    found = alone(model)
    first, last = found["changed"][ALIGNED - 1], found["changed"][-1]
    new = {"1", "2", "3"} if model == "untied" else {"0", "3"}
    assert first == sorted(learning_first(first))
    assert {name.split(".")[1] for name in first} == new
    assert "embedding.weight" in last
    assert found["teacher"]
    losses = [row[0] for row in found["results"]]
    metrics = found["metrics"]
    assert metrics["align_targets"] == ALIGNED * 128
    assert metrics["distill_targets"] == (STEPS - ALIGNED) * 128
    assert metrics["align_loss"] / metrics["align_targets"] == pytest.approx(
        sum(losses[:ALIGNED]) / ALIGNED, rel=1e-5
    )


def test_alignment_brings_blocks_closer_to_the_teachers(folder):
    engine = distillation_worker.make("converted", ParallelConfig(zero_stage=0), folder / "teacher")
    losses = []
    for step in range(ALIGNED):
        engine.begin_step(0, step)
        losses.append(engine.train_step(distillation_worker.batches(0), 1e-3).loss)
    assert losses[1] < 0.99 * losses[0]


def test_alignment_does_not_depend_on_micro_batches(folder):
    found = []
    for size in (1, 2, 4):
        engine = distillation_worker.make(
            "converted", ParallelConfig(zero_stage=0), folder / "teacher"
        )
        engine.begin_step(0, 0)
        parts = batches(0, rows=ROWS, micro_batch_size=size, length=distillation_worker.SEQ_LEN)
        result = engine.train_step(parts, 1e-3)
        found.append((result.loss, result.grad_norm))
    assert found[1:] == [pytest.approx(found[0], rel=1e-6)] * 2


def test_a_student_equal_to_its_teacher_learns_nothing(alone):
    assert alone("same")["results"][0] == (0.0, 0.0)


def test_neither_pieces_nor_a_temperature_change_what_is_equal(folder):
    found = train("same", ParallelConfig(zero_stage=0), folder / "teacher", at_once=5)
    assert found["results"][0] == (0.0, 0.0)


def test_pieces_change_nothing(alone, folder):
    found = train("converted", ParallelConfig(zero_stage=0), folder / "teacher", at_once=5)
    for mine, theirs in zip(found["results"], alone("converted")["results"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_frozen_parameters_keep_their_bits_and_have_no_state(folder):
    engine = distillation_worker.make("frozen", ParallelConfig(zero_stage=0), folder / "teacher")
    names = set(engine.backend.optimizer_state(saving=False))
    assert not any(".embedding." in n or ".mlp." in n or ".blocks.1." in n for n in names)
    assert "optimizer.state.exp_avg.blocks.0.mixer.q_proj.weight" in names


def test_rows_that_pad_a_teachers_vocabulary_are_cut(alone, folder):
    engine = distillation_worker.make("padded", ParallelConfig(zero_stage=0), folder / "teacher")
    distilled: Any = engine.parts[0].distilled
    weight = distilled.teacher.embedding.weight
    assert len(weight) == distillation_worker.PADDED_ROWS
    assert torch.equal(distilled._head, weight[:VOCAB])
    with torch.no_grad():
        weight[VOCAB:] += 100.0
    loss, _ = distillation_worker.step_of(engine, 0)
    assert loss == alone("padded")["results"][0][0]


def test_only_parameters_that_are_not_frozen_change(alone):
    changed = alone("frozen")["changed"][-1]
    assert changed
    assert not [n for n in changed if n.startswith(("embedding", "blocks.1.")) or ".mlp." in n]


@pytest.fixture(scope="module")
def divided(folder):
    run_on(2, distillation_worker.__name__, folder)
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", distillation_worker.RESUMED)
def test_every_backend_resumes_in_and_after_alignment(layout, divided):
    for found in (each[f"resumed-{layout}"] for each in divided):
        for done, rest in found["resumed"].items():
            assert rest == found["whole"][int(done) :]


@pytest.mark.slow
def test_a_sharded_vocabulary_has_the_whole_ones_values_and_gradients(divided):
    for found in divided:
        assert len(found["sharded"]) == 8
        assert max(found["sharded"]) < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_layout_learns_the_same(name, divided, alone):
    model, _ = CASES[name]
    wanted = alone(model)
    for found in (each[name] for each in divided):
        assert found["teacher"]
        tolerance: Any = {"rel": 2e-2} if model == "bf16" else {"rel": 2e-4, "abs": 1e-6}
        if model == "same":  # what rounding leaves, an optimizer makes as large as anything
            assert found["results"][0] == [0.0, 0.0]
            continue
        for mine, theirs in zip(found["results"], wanted["results"], strict=True):
            assert mine == pytest.approx(list(theirs), **tolerance)
        for mine, theirs in zip(found["changed"], wanted["changed"], strict=True):
            assert set(mine) <= set(theirs)
