"""Merges beside what a law says of the decays that they stand for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evals.scaling import AnnealingLaw, Curve, fit
from evals.scaling.commands import main
from evals.scaling.fitting import load_fit
from evals.scaling.merges import decay_of, predict_merge, read_merge
from evals.scaling.schedules import schedule_lr
from pretrain.common.errors import UserError
from pretrain.config import ScheduleConfig
from pretrain.merge.weights import decay_shares, weights_of
from tests.helpers.scaling_runs import run_directory

TRUTH = {"alpha": 0.5, "memory": np.log(50.0)}, np.array([2.0, 1.0, 40.0])
TRUNK = {"kind": "constant", "warmup_steps": 10}


def curve(name, lr, every=5):
    step = np.arange(20, len(lr) + 1, every)
    law = AnnealingLaw()
    made = Curve(name, step, np.ones(len(step)), lr, 9)
    theta = np.array(list(TRUTH[0].values()))
    made.loss = law.loss(theta, TRUTH[1], law.prepared(made))
    return made


def merged(folder, steps, weights, name="merge", phases=(), **validation):
    """The directory of a merge of the run ``folder/run``, at a constant rate."""
    directory = run_directory(folder, [], name, schedule=TRUNK, phases=list(phases))
    noted = {
        "run": str(folder / "run"),
        "steps": list(steps),
        "weights": list(weights),
        "tokens": 25600,
        "validation": validation or None,
    }
    (directory / "merge.json").write_text(json.dumps(noted))
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A fit of the annealing law to a constant run and an abrupt drop."""
    flat = schedule_lr(ScheduleConfig("constant", 10), 1e-3, 200)
    drop = schedule_lr(ScheduleConfig("two_stage", 10, decay_fraction=0.5), 1e-3, 200)
    found = fit(AnnealingLaw(), [curve("flat", flat), curve("drop", drop)])
    path = tmp_path_factory.mktemp("fit") / "fit.json"
    path.write_text(json.dumps(found.to_json()))
    return path


@pytest.mark.parametrize("decay", ["linear", "sqrt"])
def test_weights_are_turned_back_into_their_decay(decay):
    lr = np.full(40, 3.0)
    weights = weights_of("inverse-decay", range(20, 41), decay, 0.1).tolist()
    found = decay_of(lr, range(20, 41), weights)
    assert found[:20] == pytest.approx(3.0)
    assert found[20:] == pytest.approx(3 * decay_shares(20, decay, 0.1))
    assert (lr == 3.0).all(), "a copy"
    stairs = decay_of(lr, [20, 30, 40], [0.25, 0.25, 0.5])
    assert stairs[[19, 20, 29, 30, 39]] == pytest.approx([3, 2.25, 2.25, 1.5, 1.5])


def test_the_gain_is_that_of_the_decay(saved, tmp_path, capsys):
    run_directory(tmp_path, [], schedule=TRUNK)
    steps = range(150, 201)
    weights = weights_of("inverse-decay", steps, "linear", 0.0)
    numbers = {"merged": [2.5, 0.01], "last": [2.6, 0.01], "difference": [-0.1, 0.002]}
    directory = merged(tmp_path, steps, weights, **numbers)
    out = tmp_path / "out"
    assert main(["merges", str(directory), "--fit", str(saved), "--out", str(out)]) == 0
    row = json.loads((out / "merges.json").read_text())["merges"][0]
    flat = schedule_lr(ScheduleConfig("constant", 10), 1e-3, 200)
    decayed = ScheduleConfig("wsd", 10, "linear", 0.25, 0.0)
    expected = (
        curve("flat", flat, 1).loss[-1] - curve("wsd", schedule_lr(decayed, 1e-3, 200), 1).loss[-1]
    )
    assert row["gain"] == pytest.approx(expected, rel=1e-3) and expected > 0.1
    assert row["interval"] is None
    shown = capsys.readouterr().out
    assert "2.6000" in shown and "2.5000" in shown and "0.1000 ± 0.0020" in shown


def test_a_trunk_whose_batches_change_is_counted_in_steps_of_the_last(saved, tmp_path):
    """67 steps of 256 tokens and 133 of 128 are 267 of 128, and the last 50 are as many."""
    phases = [{"until": 0.5, "global_batch_tokens": 256}, {}]
    run_directory(tmp_path, [], schedule=TRUNK, phases=phases)
    steps = range(150, 201)
    weights = weights_of("inverse-decay", steps, "linear", 0.0)
    directory = merged(tmp_path, steps, weights, phases=phases)
    row = predict_merge(load_fit(saved), "merge", read_merge(directory), directory)
    warmup = 1e-3 * np.minimum(np.arange(1, 68) / 10, 1)
    flat = np.append(np.repeat(warmup, 2), np.full(133, 1e-3))
    decayed = flat.copy()
    decayed[-50:] *= decay_shares(50, "linear", 0.0)
    expected = curve("flat", flat, 1).loss[-1] - curve("decayed", decayed, 1).loss[-1]
    assert row.gain == pytest.approx(expected, rel=1e-3) and expected > 0.1


def test_bad_input_is_one_sentence(saved, tmp_path):
    run_directory(tmp_path, [], schedule=TRUNK)
    with pytest.raises(UserError, match=r"run holds no merge \(no merge.json of one\), expected"):
        main(["merges", str(tmp_path / "run"), "--fit", str(saved), "--out", str(tmp_path)])
    directory = merged(tmp_path, [1, 2], [0.5])
    with pytest.raises(UserError, match=r"merge holds no merge"):
        main(["merges", str(directory), "--fit", str(saved), "--out", str(tmp_path)])
    with pytest.raises(UserError, match=r"nothing: no such run directory or file"):
        main(["merges", str(tmp_path / "nothing"), "--fit", str(saved), "--out", str(tmp_path)])
