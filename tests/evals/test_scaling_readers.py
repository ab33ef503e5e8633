"""Logs of all kinds become curves; what is wrong with them is said."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas
import pytest

from benchmarks.scaling_laws import CURVES, FITTED, read
from evals.scaling import Reading, curve_law, fit, points_of, read_curves, read_points
from evals.scaling.intervals import mape
from evals.scaling.schedules import parse_schedule, schedule_lr
from pretrain.common.errors import UserError
from pretrain.config import load_saved_config
from tests.helpers.scaling_runs import run_directory

SCHEDULE = "kind=cosine lr=1e-3 steps=200 warmup_steps=20"


def losses(steps):
    return 3 + 2 * (np.asarray(steps) + 10.0) ** -0.4


def learning_rates(steps):
    schedule, peak, total = parse_schedule(SCHEDULE)
    lr = schedule_lr(schedule, peak, total)
    return lr[np.asarray(steps) - 1]


def table(steps, **columns):
    return pandas.DataFrame(
        {"step": steps, "lr": learning_rates(steps), "loss": losses(steps)} | columns
    )


def write(folder, frame, name="a.csv"):
    frame.to_csv(folder / name, index=False)
    return folder / name


def one(path, **reading):
    (curve,), skipped = read_curves([path], Reading(**reading))
    assert not skipped
    return curve


def rows(steps):
    lr = learning_rates(steps)
    return [
        {"step": int(s), "tokens": int(s) * 128, "loss": float(x), "lr": float(r)}
        for s, x, r in zip(steps, losses(steps), lr, strict=True)
    ]


def test_a_run_directory_has_the_schedule_of_its_config(tmp_path):
    steps = np.arange(5, 201, 5)
    curve = one(run_directory(tmp_path, rows(steps)))
    assert (curve.parameters, curve.tokens_per_step, curve.flops_per_token) == (5000, 128, 31000)
    assert not curve.warnings
    assert curve.warmup == 19
    assert curve.step[0] == 20, "what was logged in the warm-up is left out"
    assert np.allclose(curve.lr[steps - 1], learning_rates(steps))
    assert curve.labels["optimizer.lr"] == 1e-3
    assert one(tmp_path / "run", embeddings=False).parameters == 3000
    points = points_of([curve])
    assert points.tokens[0] == 200 * 128
    assert points.flops is not None
    assert points.flops[0] == 200 * 128 * 31000.0


def test_the_first_steps_of_a_branch_have_the_rates_of_its_trunk(tmp_path):
    """A trunk with another warm-up and peak, of which the branch has the first 100 steps."""
    decay = {"kind": "wsd", "warmup_steps": 20, "decay_fraction": 0.5, "final_ratio": 0.0}
    trunk = {"kind": "constant", "warmup_steps": 40}
    branch = run_directory(tmp_path, rows(np.arange(105, 201, 5)), schedule=decay)
    parent = {"step": 100, "schedule": trunk, "lr": 2e-3, "num_steps": 150}
    (branch / "parent.json").write_text(json.dumps(parent))
    lr = one(branch).lr
    assert np.allclose(lr[[0, 39, 40, 99]], [5e-5, 2e-3, 2e-3, 2e-3])
    assert np.allclose(lr[[100, 150, 199]], [1e-3, 5e-4, 1e-5])


def test_a_folder_of_runs_and_a_folder_of_tables(tmp_path):
    for name in ("b", "a"):
        run_directory(tmp_path, rows(np.arange(5, 201, 5)), name)
    assert [c.name for c in read_curves([tmp_path])[0]] == ["a", "b"]
    tables = tmp_path / "tables"
    tables.mkdir()
    write(tables, table(np.arange(10, 201, 10)))
    table(np.arange(10, 201, 10)).to_parquet(tables / "b.parquet")
    first, second = read_curves([tables])[0]
    assert np.array_equal(first.loss, second.loss)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no metrics.jsonl, CSV, Parquet"):
        read_curves([tmp_path / "empty"])


def test_sparse_learning_rates_are_interpolated_with_a_warning(tmp_path):
    steps = np.arange(20, 201, 20)
    curve = one(write(tmp_path, table(steps)))
    assert any("logged every 20 steps and interpolated" in w for w in curve.warnings)
    assert any("assumed to be a warm-up from 0" in w for w in curve.warnings)
    assert curve.lr[9] == pytest.approx(0.5e-3, rel=0.11)
    # The log tells of the step before: within one step's change of the schedule.
    exact = schedule_lr(*parse_schedule(SCHEDULE))
    assert np.abs(curve.lr[21:200] - exact[21:200]).max() < 2e-5
    given = one(tmp_path / "a.csv", schedule=SCHEDULE)
    assert not given.warnings
    assert np.allclose(given.lr, exact)


def test_the_published_curves_without_their_schedules(tmp_path):
    """Interpolation of what was logged every 128 steps costs little."""
    exact = read(CURVES / "csv_100")
    guessed = {name: one(CURVES / f"csv_100/{name}.csv", warmup_steps=2160) for name in exact}
    assert any("jumps between steps" in w for w in guessed["wsdcon_9"].warnings)
    for found in (exact, guessed):
        chosen = [found[name] for name in FITTED]
        fitted = fit(curve_law("intrinsic", chosen), chosen)
        errors = [mape(fitted, c) for name, c in found.items() if name not in FITTED]
        assert np.mean(errors) < 0.09


def test_a_schedule_that_the_log_does_not_follow(tmp_path):
    path = write(tmp_path, table(np.arange(10, 201, 10)))
    curve = one(path, schedule=SCHEDULE.replace("cosine", "constant"))
    (warning,) = curve.warnings
    assert "differs from the schedule's by up to 90 % of the peak, at step 200" in warning
    with pytest.raises(UserError, match="logged up to step 200, but the schedule ends at 150"):
        run_directory(tmp_path, rows(np.arange(5, 201, 5)), train={"steps": 150})
        one(tmp_path / "run")


def test_a_resumed_log_counts_the_later_step_and_gaps_are_told(tmp_path):
    steps = np.array([*range(10, 101, 10), *range(80, 121, 10), *range(190, 201)])
    frame = table(steps)
    frame.loc[10, "loss"] = 9.0  # step 80, the second time
    curve = one(write(tmp_path, frame), schedule=SCHEDULE)
    assert curve.loss[list(curve.step).index(80)] == 9.0
    assert (np.diff(curve.step) > 0).all()
    assert any("3 steps were logged more than once, the last" in w for w in curve.warnings)
    assert any("nothing is logged between steps 120 and 190" in w for w in curve.warnings)


def test_losses_that_are_not_finite_are_left_out_and_divergent_runs_named(tmp_path):
    steps = np.arange(10, 201, 10)
    frame = table(steps)
    frame.loc[5, "loss"] = math.nan
    frame.loc[6, "loss"] = math.inf
    curve = one(write(tmp_path, frame), schedule=SCHEDULE)
    # An empty cell of a CSV is a step without a loss, infinity is a loss.
    assert any(
        "1 losses that are not finite (the first at step 70) were skipped" in w
        for w in curve.warnings
    )
    assert len(curve.loss) == len(steps) - 1 - 2
    good = write(tmp_path, table(steps), "good.csv")
    diverged = table(np.arange(1, 201))
    diverged.loc[150:, "loss"] = 8.0
    ends = table(steps)
    ends.loc[15:, "loss"] = math.inf
    bad = [write(tmp_path, diverged, "bad.csv"), write(tmp_path, ends, "ends.csv")]
    curves, skipped = read_curves([good, *bad], Reading(schedule=SCHEDULE))
    assert [c.name for c in curves] == ["good"]
    assert "bad is skipped: it diverged: its loss ends" in skipped[0]
    assert "ends is skipped: its last losses are not finite" in skipped[1]
    with pytest.raises(UserError, match="there is no curve to fit; bad is skipped"):
        read_curves(bad[:1], Reading(schedule=SCHEDULE))
    kept = read_curves(bad[:1], Reading(schedule=SCHEDULE, keep_diverged=True))[0]
    assert len(kept) == 1


def test_wandb_exports(tmp_path):
    steps = np.arange(10, 201, 10)
    frame = pandas.DataFrame(
        {
            "Step": steps,
            "fast - train/loss": losses(steps),
            "fast - train/loss__MIN": losses(steps),
            "slow - train/loss": losses(steps) + 0.1,
            "slow - train/loss__MAX": losses(steps),
        }
    )
    curves, _ = read_curves([write(tmp_path, frame)], Reading(schedule=SCHEDULE))
    assert [c.name for c in curves] == ["fast", "slow"]
    assert curves[1].loss[0] == pytest.approx(curves[0].loss[0] + 0.1)
    history = pandas.DataFrame(
        {
            "_step": np.repeat(steps, 2),
            "train/loss": np.ravel([[x, math.nan] for x in losses(steps)]),
            "train/lr": np.ravel([[math.nan, x] for x in learning_rates(steps)]),
        }
    )
    curve = one(write(tmp_path, history, "history.csv"))
    assert len(curve.loss) == len(steps) - 1
    with pytest.raises(UserError, match="no learning rate is logged; give the schedule"):
        read_curves([tmp_path / "a.csv"])


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    steps = np.arange(10, 201, 10)
    with SummaryWriter(str(tmp_path / "events")) as writer:
        for step, loss, lr in zip(steps, losses(steps), learning_rates(steps), strict=True):
            writer.add_scalar("train/loss", loss, step)
            writer.add_scalar("train/lr", lr, step)
    curve = one(tmp_path / "events")
    assert curve.name == "events"
    assert np.allclose(curve.loss, losses(steps)[1:], rtol=1e-6)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"step": "it", "loss": "nll"}, "no column 'nll', found: it, lr, ce"),
        ({"step": "it"}, r"no column is known as the loss, found: it, lr, ce; name it with"),
        ({}, "no column is known as the step"),
    ],
)
def test_columns_are_named(columns, message, tmp_path):
    steps = np.arange(10, 201, 10)
    frame = table(steps).rename(columns={"step": "it", "loss": "ce"})
    path = write(tmp_path, frame)
    with pytest.raises(UserError, match=message):
        one(path, columns=columns)
    assert len(one(path, columns={"step": "it", "loss": "ce"}).loss) == 19


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind=cosine steps=10", "lr is missing"),
        ("kind=cosine lr=1 steps=many", "expected numbers for lr and steps"),
        ("kind=cosine lr=0 steps=5", "expected lr above 0"),
        ("kind=cosin lr=1 steps=5", "cosin"),
        ("cosine", "found 'cosine', expected NAME=VALUE"),
        ("kind=cosine lr=1 steps=5 warm=3", "warm"),
    ],
)
def test_bad_schedules_are_one_sentence(text, message):
    with pytest.raises(UserError, match=message):
        parse_schedule(text)


def test_a_grid_can_be_named_in_any_way(tmp_path):
    """Its directory, a glob with the launcher's files, links, runs that have not begun."""
    rows = [{"step": s, "tokens": s, "loss": 5 - s / 100, "lr": 1e-3} for s in range(20, 201, 20)]
    grids = [tmp_path / "one", tmp_path / "two"]
    for grid in grids:
        grid.mkdir()
        for name in ("seed=0", "[red]$x$"):
            run_directory(grid, rows, name)
        waiting = run_directory(grid, [], "waiting")
        (waiting / "metrics.jsonl").unlink()
        run_directory(grid, [{"step": 1, "tokens": 1, "valid_loss": 3.0}], "validated")
        (grid / "grid.json").write_text("{}")
        (grid / "slurm-1.txt").write_text("")
    (tmp_path / "link").symlink_to(grids[0])
    for words in (
        [grids[0]],
        sorted(grids[0].iterdir()),
        [grids[0] / "*", tmp_path / "link", grids[0] / "seed=0"],
    ):
        curves, skipped = read_curves(words)
        assert sorted(c.name for c in curves) == ["[red]$x$", "seed=0"], words
        assert any("validated is skipped: it has logged no loss yet" in s for s in skipped)
    curves, _ = read_curves(grids)
    assert sorted(c.name for c in curves) == [
        *("one/[red]$x$", "one/seed=0", "two/[red]$x$", "two/seed=0")
    ]
    with pytest.raises(UserError, match=r"no curve to fit; .*waiting is skipped"):
        read_curves([grids[0] / "waiting"])


def test_other_bad_input(tmp_path):
    with pytest.raises(UserError, match="no such run directory or file"):
        read_curves([tmp_path / "none"])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"expected a run directory, \.csv"):
        read_curves([tmp_path / "a.txt"])
    path = write(tmp_path, table(np.arange(10, 21, 10)))
    with pytest.raises(UserError, match="no loss is logged from step 500 on, the last is at 20"):
        one(path, schedule=SCHEDULE, from_step=500)
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", table(np.arange(10, 21, 10)))
    curves, _ = read_curves([path, other], Reading(schedule=SCHEDULE))
    assert [c.name for c in curves] == [f"{tmp_path.name}/a", "other/a"]
    assert len(read_curves([path, path], Reading(schedule=SCHEDULE))[0]) == 1
    words = write(tmp_path, pandas.DataFrame({"step": ["x"], "loss": [1]}), "words.csv")
    with pytest.raises(UserError, match="column 'step' holds values that are not numbers"):
        one(words, schedule=SCHEDULE)


def test_a_table_of_runs(tmp_path):
    frame = pandas.DataFrame(
        {
            "N": [1e6, 2e6, 3e6, 4e6],
            "D": [1e8, 2e8, 3e8, 4e8],
            "loss": [4, 3.5, math.nan, 3],
            "name": list("abcd"),
        }
    )
    points = read_points(write(tmp_path, frame))
    assert list(points.names) == ["a", "b", "d"]
    assert points.flops is not None
    assert points.flops[0] == 6e14
    assert points.warnings == ["1 runs without a finite loss were skipped"]
    frame.loc[0, "N"] = -1
    with pytest.raises(UserError, match=r"parameters holds -1\.0, expected positive numbers"):
        read_points(write(tmp_path, frame))
    with pytest.raises(UserError, match="no column is known as parameters, found: size, D"):
        read_points(write(tmp_path, frame.rename(columns={"N": "size"})))


@pytest.mark.parametrize("step", ["-1", "1.5", "1e30", "inf", "-0.25"])
@pytest.mark.parametrize("row", [0, 3, 9])
def test_steps_that_are_none_are_refused(tmp_path, step, row):
    steps = [str(s) for s in range(1, 11)]
    steps[row] = step
    path = tmp_path / "curve.csv"
    path.write_text("step,loss,lr\n" + "".join(f"{s},3.0,1e-3\n" for s in steps))
    with pytest.raises(UserError, match=r"a step is .*, expected whole numbers from 0 to"):
        read_curves([path])


@pytest.mark.parametrize("text", ["lr=1e-3 steps=inf", "lr=nan steps=10", "lr=1e-3 steps=1e30"])
def test_schedules_without_an_end_are_refused(text):
    with pytest.raises(UserError, match="lr"):
        parse_schedule(f"kind=cosine {text}")


@pytest.mark.parametrize("column", ["flops", "unique_tokens", "tokens", "parameters"])
@pytest.mark.parametrize("value", [0, -1, "inf"])
def test_runs_of_sizes_that_are_none_are_refused(tmp_path, column, value):
    rows = {"parameters": 1e6, "tokens": 1e8, "loss": 3.0, "flops": 1e15, "unique_tokens": 1e7}
    rows[column] = value
    path = tmp_path / "runs.csv"
    path.write_text(",".join(rows) + "\n" + ",".join(map(str, rows.values())) + "\n")
    with pytest.raises(UserError, match=f"{column} holds .*, expected positive numbers"):
        read_points(path)


def test_a_run_in_phases_has_the_learning_rates_of_all_of_them(tmp_path):
    steps = np.arange(5, 201, 5)
    first: dict[str, Any] = {"until": 0.5}
    phases = [first, {"schedule": {"kind": "linear", "final_ratio": 0.5}}]
    folder = run_directory(tmp_path, rows(steps), phases=phases)
    curve, config = one(folder), load_saved_config(folder / "config.yaml")
    assert np.array_equal(curve.lr, [config.plan.learning_rate(step) for step in range(200)])
    assert curve.tokens_per_step == 128
    first["global_batch_tokens"] = 256
    folder = run_directory(tmp_path, rows(steps), "grown", phases=phases)
    curve, plan = one(folder), load_saved_config(folder / "config.yaml").plan
    # Steps of 128 tokens are counted, as at the end: each of the first 67 is two of them.
    assert (plan.phases[0].last, plan.num_steps, curve.tokens_per_step) == (67, 200, 128)
    assert len(curve.lr) == 267
    expected = np.repeat([plan.learning_rate(step) for step in range(200)], [2] * 67 + [1] * 133)
    assert np.array_equal(curve.lr, expected)
    logged = steps[steps > 19]
    assert curve.step.tolist() == [2 * s if s <= 67 else s + 67 for s in logged]
    assert curve.tokens is not None
    assert curve.tokens.tolist() == [plan.tokens_before(s) for s in logged]
    assert np.array_equal(curve.loss, losses(logged))
    assert any("its batch size changes; steps of 128 tokens" in w for w in curve.warnings)
