"""Logs as other programs write them: names, axes, units, and what is wrong with them."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas
import pytest

from benchmarks.scaling_laws import CURVES
from evals.scaling import (
    Reading,
    annealing_laws,
    curve_law,
    progress,
    read_curves,
    read_points,
    readers,
)
from evals.scaling.planning import planned_curve
from evals.scaling.points_tables import is_points_table
from evals.scaling.thinning import smoothness, thin
from pretrain.common.errors import UserError
from pretrain.config import ScheduleConfig
from tests.helpers.scaling_logs import SCHEDULE, STEPS, losses, one, rates, write

OLMO = ("_step", "Metrics/loss", "optim/learning_rate_group0", "throughput/total_tokens")


@pytest.mark.parametrize(
    ("names", "tokens"),
    [
        (OLMO, True),
        (("_step", "train/CE loss", "optim/LR (group 0)", "throughput/total tokens"), True),
        (("iteration_step", "lm_loss", "lr", "consumed_tokens"), True),
        (("train/global_step", "train/loss", "train/learning_rate", "other"), False),
        (("trainer/global_step", "train_loss", "lr-AdamW/pg1", "other"), False),
        (("step", "loss_metrics/global_avg_loss", "lr", "n_tokens_seen"), True),
    ],
)
def test_names_of_other_programs(names, tokens, tmp_path):
    values = (STEPS, losses(), rates(), STEPS * 4096.0)
    path = write(tmp_path / "a.csv", dict(zip(names, values, strict=True)))
    curve = one(path)
    # The corner between the logged steps 100 and 110 is found.
    assert (curve.warmup, curve.step[0], curve.step[-1]) == (105, 110, 2000)
    assert np.allclose(curve.loss, losses()[10:])
    assert np.abs(curve.lr[1:2000] - rates(np.arange(2, 2001))).max() < 0.02e-3
    assert curve.tokens_per_step == (4096 if tokens else None)
    assert curve.warnings == []


def test_a_step_of_the_run_comes_before_that_of_wandb(tmp_path):
    columns = {"_step": STEPS // 10, "train/global_step": STEPS, "loss": losses(), "lr": rates()}
    assert one(write(tmp_path / "a.csv", columns)).step[-1] == 2000


@pytest.mark.parametrize(
    ("separator", "decimal"), [(";", "."), (";", ","), ("\t", "."), (" ", ".")]
)
def test_what_separates_columns_is_seen(separator, decimal, tmp_path):
    columns = {"step": STEPS, "loss": losses(), "lr": rates()}
    path = write(tmp_path / "a.csv", columns, sep=separator, decimal=decimal)
    assert np.allclose(one(path).loss, losses()[10:])


def test_trainer_state_and_its_checkpoints(tmp_path):
    for last in (500, 2000):
        rows = [
            {"step": int(s), "loss": float(x), "learning_rate": float(r), "epoch": 0.1}
            for s, x, r in zip(STEPS, losses(), rates(), strict=True)
            if s <= last
        ]
        rows.append({"step": last, "eval_loss": 9.0})
        folder = tmp_path / f"hf/checkpoint-{last}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    curve = one(tmp_path / "hf")
    assert (curve.name, curve.step[-1], curve.loss.max() < 9) == ("hf", 2000, True)
    (tmp_path / "trainer_state.json").write_text("[1]")
    with pytest.raises(UserError, match="expected rows of metrics, or a trainer's state"):
        one(tmp_path / "trainer_state.json")


def test_logs_of_megatron_and_nanotron(tmp_path):
    lines = [
        f" [2025-01-01 10:00:00] iteration {s:8d}/    2000 | consumed samples: {s * 8:12d} | "
        f"elapsed time per iteration (ms): 100.0 | learning rate: {r:.6E} | global batch size:     "
        f"8 | lm loss: {x:.6E} | loss scale: 1.0 | number of nan iterations:   0 |"
        for s, x, r in zip(STEPS, losses(), rates(), strict=True)
    ]
    (tmp_path / "a.log").write_text("\n".join(["building model ...", *lines]))
    curve = one(tmp_path / "a.log")
    assert np.allclose(curve.loss, losses()[10:], rtol=1e-5)
    assert curve.warmup == 105
    lines = [
        f"01/01/2025 10:00:00 [INFO|DP=0]: iteration: {s} / 2000 | consumed_tokens: {s * 4}K | "
        f"elapsed_time_per_iteration_ms: 1.5K | global_batch_size: 4K | lm_loss: {x:.6f} | "
        f"lr: {r:.8f} | grad_norm: 0.5"
        for s, x, r in zip(STEPS, losses(), rates(), strict=True)
    ]
    (tmp_path / "b.txt").write_text("\n".join(lines))
    curve = one(tmp_path / "b.txt")
    assert np.allclose(curve.loss, losses()[10:], rtol=1e-5)
    assert curve.tokens_per_step == 4000


def test_parts_of_a_run_in_files_of_their_own(tmp_path):
    """TensorBoard's and wandb's exports have one metric each; rates lie at other steps."""
    wall = {"Wall time": STEPS * 1.0}
    write(tmp_path / "tb/run-x-tag-train_loss.csv", wall | {"Step": STEPS, "Value": losses()})
    sparse = np.append(np.arange(15, 2000, 25), 2000)
    write(
        tmp_path / "tb/run-x-tag-train_learning_rate.csv",
        {"Wall time": sparse, "Step": sparse, "Value": rates(sparse)},
    )
    curve = one(tmp_path / "tb")
    assert (curve.name, curve.warmup, curve.warnings) == ("x", 105, [])
    assert np.abs(curve.lr[20:2000] - rates(np.arange(21, 2001))).max() < 0.02e-3
    loss = write(tmp_path / "l.csv", {"Step": STEPS, "x - train/loss": losses()})
    lr = write(tmp_path / "r.csv", {"Step": sparse, "x - train/learning_rate": rates(sparse)})
    assert np.array_equal(one(lr, loss).lr, curve.lr)
    with pytest.raises(UserError, match="no column is known as the loss of x"):
        one(lr)


def test_runs_below_each_other_in_one_table(tmp_path):
    parts = [
        pandas.DataFrame(
            {"run": f"r{i}", "params": 1e6 * i, "step": STEPS, "loss": losses() + i, "lr": rates()}
        )
        for i in (1, 2)
    ]
    path = write(tmp_path / "a.csv", pandas.concat(parts))
    curves, _ = read_curves([path])
    assert [(c.name, c.parameters) for c in curves] == [("r1", 1e6), ("r2", 2e6)]
    assert np.allclose(curves[1].loss - curves[0].loss, 1)


def test_an_axis_of_tokens(tmp_path):
    tokens = STEPS * 5e7
    assert tokens[-1] == 1e11
    columns = {"loss": losses(), "lr": rates()}
    as_step = write(tmp_path / "a.csv", {"step": tokens} | columns)
    as_tokens = write(tmp_path / "b.csv", {"total_tokens": tokens} | columns)
    for path in (as_step, as_tokens):
        curve = one(path)
        assert (curve.step[-1], curve.tokens_per_step) == (50_000, 2e6)
        assert any("counts tokens; 2,000,000 of them count as a step" in w for w in curve.warnings)
        known = one(path, tokens_per_step=5e7)
        assert (known.step[-1], known.warmup, known.warnings) == (2000, 105, [])
        assert np.allclose(known.loss, losses()[10:])
    named = one(as_step, columns={"tokens": "step"}, tokens_per_step=5e7)
    assert named.step[-1] == 2000
    (given,), _ = read_curves([as_tokens], Reading(axis_unit=1e8))
    assert (given.step[-1], given.tokens_per_step) == (1000, 1e8)
    both, _ = read_curves([as_tokens], Reading(), known=[known])
    assert both[0].tokens_per_step == 5e7, "the unit of the curves that were fitted"


def test_a_batch_warmup_is_counted_in_tokens(tmp_path):
    """Batches of 100 tokens for 1,000 steps, then of 400: 1,250 steps of 400."""
    tokens = np.where(STEPS <= 1000, 100 * STEPS, 100_000 + 400 * (STEPS - 1000))
    columns = {"step": STEPS, "loss": losses(tokens / 400), "tokens": tokens}
    text = "kind=wsd lr=1e-3 steps=2000 warmup_steps=200 decay=linear decay_fraction=0.2"
    path = write(tmp_path / "a.csv", columns | {"lr": rates(text=text)})
    for reading in ({}, {"schedule": text}):
        curve = one(path, **reading)
        assert (curve.step[-1], curve.tokens_per_step, curve.warmup) == (1250, 400, 50)
        assert np.allclose(curve.loss, losses(curve.step), atol=2e-3)
        assert curve.lr[849] == pytest.approx(1e-3)
        assert curve.lr[1050] == pytest.approx(0.55e-3, rel=0.01)
        assert any("batch size changes; steps of 400 tokens" in w for w in curve.warnings)
    late = STEPS >= 1500
    part = {name: value[late] for name, value in (columns | {"lr": rates(text=text)}).items()}
    branch = write(tmp_path / "branch.csv", part)
    curves, _ = read_curves([path, branch], Reading(branch_of={"branch": "a"}))
    assert np.abs(curves[1].lr[:1250] - curves[0].lr[:1250]).max() < 1e-6, "on the same axis"
    falling = write(tmp_path / "b.csv", columns | {"tokens": tokens[::-1], "lr": rates()})
    assert any("tokens do not grow with the step" in w for w in one(falling).warnings)


def test_bits_and_options_of_each_curve(tmp_path):
    columns = {"step": STEPS, "loss": losses() / math.log(2), "lr": rates()}
    paths = [write(tmp_path / f"{n}.csv", columns) for n in ("small", "large-1", "large-2")]
    reading = Reading(
        unit={"large*": "bits"},
        parameters={"small": 1e6, "large*": 2e6},
        tokens_per_step=512,
    )
    curves, _ = read_curves(paths, reading)
    assert [c.parameters for c in curves] == [1e6, 2e6, 2e6]
    assert np.allclose(curves[0].loss * math.log(2), curves[1].loss)
    assert {c.tokens_per_step for c in curves} == {512}
    reading.check_names()
    typo = Reading(parameters={"smal": 1e6})
    read_curves(paths, typo)
    with pytest.raises(UserError, match="--parameters names 'smal', which no curve is called"):
        typo.check_names()


def test_long_logs_become_means(tmp_path):
    steps = np.arange(1, 34_001)
    text = SCHEDULE.replace("steps=2000 ", "steps=34000 ")
    path = write(
        tmp_path / "a.csv", {"step": steps, "loss": losses(steps, 0.05), "lr": rates(steps, text)}
    )
    curve = one(path)
    assert 250 < len(curve.loss) <= 300
    assert (np.diff(curve.step) > 0).all()
    assert curve.warnings == []
    assert curve.averaged == pytest.approx(113, abs=10)
    late = curve.step > 5000
    assert np.abs(curve.loss - losses(curve.step))[late].std() < 0.05 / 8
    assert curve.loss[-1] == pytest.approx(losses(steps)[-1], abs=0.05 / 3), "a mean as well"
    assert len(one(path, points=0).loss) == 34_000 - 104
    smooth = losses(steps)
    middle, mean = thin(steps[100:].astype(float), smooth[100:], 300)
    assert np.abs(mean / losses(middle) - 1).max() < 2e-4, "means do not bend a power law"


def test_smoothed_losses_are_noticed(tmp_path):
    raw = losses(np.arange(100, 2100), 0.03)
    for factor in (0.0, 0.9, 0.99):
        mean, smoothed = raw[0], []
        for value in raw:
            mean = factor * mean + (1 - factor) * value
            smoothed.append(mean)
        assert (smoothness(np.array(smoothed)) is not None) == (factor > 0), factor
    assert smoothness(np.convolve(raw, np.ones(50) / 50, "valid")) is not None
    assert smoothness(raw[:50]) is None
    assert smoothness(losses(np.arange(100, 2100))) is None, "nothing is known without noise"
    for path in CURVES.glob("csv_*/*.csv"):
        assert smoothness(pandas.read_csv(path).loss.to_numpy()) is None, path
    path = write(tmp_path / "a.csv", {"step": np.arange(2000), "loss": smoothed[:2000], "lr": 1e-3})
    assert any("its losses look smoothed" in w for w in one(path).warnings)


def test_columns_decide_the_kind_of_a_table(tmp_path):
    path = write(
        tmp_path / "a.csv", {"params": [1e6, 2e6], "tokens": [1e8, 2e8], "step": 5, "l": [4, 3.0]}
    )
    assert is_points_table(path)
    assert is_points_table(path, {"parameters": "params", "loss": "l"})
    assert not is_points_table(path, {"step": "step", "loss": "l"})
    curve = write(tmp_path / "b.csv", {"tokens": STEPS, "loss": losses(), "lr": rates()})
    assert not is_points_table(curve)
    curve = write(tmp_path / "c.csv", {"name": "x", "params": 1e6, "tokens": STEPS, "step": STEPS})
    assert not is_points_table(curve), "one run, a row for each step"


def test_tokens_follow_from_compute_and_size(tmp_path):
    path = write(tmp_path / "a.csv", {"C": [6e14, 2.4e15], "N": [1e6, 2e6], "loss": [4, 3.0]})
    points = read_points(path)
    assert list(points.tokens) == [1e8, 2e8]
    assert points.warnings == ["tokens are computed as C / (6 N)"]
    path = write(tmp_path / "b.csv", {"C": [6e14, 2.4e15], "D": [1e8, 2e8], "loss": [4, 3.0]})
    assert list(read_points(path).parameters) == [1e6, 2e6]


@pytest.mark.parametrize(
    ("columns", "reading", "message"),
    [
        ({"loss": -losses()}, {}, "a loss is -3.6.*, expected above 0"),
        ({"lr": -rates()}, {}, "a learning rate is -.*, expected 0 or more"),
        ({"step": STEPS * 1e8}, {"tokens_per_step": 1.0}, "more than 10,000,000 steps of 1 tokens"),
        ({"step": STEPS * 1e8}, {"tokens_per_step": 1e20}, "no loss is logged from step 1 on"),
        ({"lr": np.nan}, {}, "no learning rate is logged; give the schedule"),
        ({}, {"columns": {"tokens": "seen"}}, "has no column 'seen', found: step, loss, lr"),
    ],
)
def test_logs_that_cannot_be_meant(columns, reading, message, tmp_path):
    path = write(tmp_path / "a.csv", {"step": STEPS, "loss": losses(), "lr": rates()} | columns)
    with pytest.raises(UserError, match=message):
        one(path, **reading)


def test_long_logs_cost_little_memory(monkeypatch):
    """Changes of the rate are summed in larger blocks, medians are not taken all at once."""
    curve = planned_curve(ScheduleConfig("cosine", 100), 1e-3, 30_000, points=200)
    law = curve_law("multi_power", [curve])
    theta = np.array([0.5, math.log(10.0), math.log(0.6), 0.4])
    beta = np.array([3.0, 0.6, 0.2])
    found = law.prepared(curve)
    assert len(found.drops) <= annealing_laws.MOST_BLOCKS + 200
    monkeypatch.setattr(annealing_laws, "MOST_DROPS", 10**9)
    every = law.prepared(curve)
    assert len(every.drops) > 1800
    assert np.allclose(law.loss(theta, beta, found), law.loss(theta, beta, every), rtol=1e-4)
    loss = losses(np.arange(1, 400), 0.1)
    whole = readers._medians(loss, 20)
    monkeypatch.setattr(readers, "MANY", 100)
    assert np.array_equal(readers._medians(loss, 20), whole)


def test_what_takes_long_says_how_far_it_is(monkeypatch, capsys):
    assert list(progress.counted("abc", 3, "samples")) == list("abc")
    assert capsys.readouterr().err == "", "what is quick says nothing"
    monkeypatch.setattr(progress, "FIRST", 0)
    assert list(progress.counted("abc", 3, "samples")) == list("abc")
    assert capsys.readouterr().err == "samples: 1 of 3\n"
