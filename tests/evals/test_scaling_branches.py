"""Runs that branch off others have their history; lists of curves say what logs do not."""

from __future__ import annotations

import math

import numpy as np
import pandas
import pytest

from benchmarks.scaling_laws import CURVES, FITTED, read
from evals.scaling import Reading, read_curves
from pretrain.common.errors import UserError
from tests.helpers.scaling_logs import SCHEDULE, STEPS, losses, one, rates, write


def trunk_and_branch(tmp_path, cut=9000):
    """Cut a published curve where it decays: its history is that of the constant run."""
    whole = pandas.read_csv(CURVES / "csv_25/wsd_20000_24000.csv")
    trunk = CURVES / "csv_25/constant_24000.csv"
    return trunk, write(tmp_path / "branch.csv", whole[whole.step > cut])


def test_a_branch_has_the_history_of_its_trunk(tmp_path):
    trunk, branch = trunk_and_branch(tmp_path)
    exact = one(CURVES / "csv_25/wsd_20000_24000.csv", warmup_steps=2160)
    for named in (None, {"branch": "constant_24000"}, {"branch": "constant_24000@9000"}):
        reading = Reading(branch_of=named, warmup_steps={"constant*": 2160})
        curves, _ = read_curves([branch, trunk], reading)
        found = next(c for c in curves if c.name == "branch")
        assert np.abs(found.lr[:24000] - exact.lr[:24000]).max() < 1e-9, named
        assert found.warmup == 2160
        told = [w for w in found.warnings if "has the learning rates of constant_24000" in w]
        assert len(told) == (named is None)
    fitted = curves[1:]
    later, _ = read_curves([branch], Reading(), fitted)
    assert np.array_equal(later[0].lr, found.lr), "a trunk may have been read before"


def test_a_branch_with_another_rate_leaves_a_constant_run(tmp_path):
    whole = pandas.read_csv(CURVES / "csv_25/wsdcon_9.csv")
    branch = write(tmp_path / "branch.csv", whole[whole.step > 8000])
    trunks = [CURVES / f"csv_25/{kind}_24000.csv" for kind in ("cosine", "constant")]
    found = read_curves([branch, *trunks], Reading(warmup_steps=2160))[0][0]
    assert "learning rates of constant_24000 before" in found.warnings[0]
    assert set(found.lr[2160:8064]) == {3e-4}
    assert set(found.lr[8064:]) == {9e-5}
    again = pandas.read_csv(branch).assign(lr=lambda f: 1e-4 + (f.step - 8000) * 5e-8)
    rising = write(tmp_path / "rising.csv", again)
    assert "before 8,128, the first logged one, are assumed" in one(rising).warnings[0]
    found = read_curves([rising, trunks[1]], Reading())[0][0]
    assert set(found.lr[2176:8064]) == {3e-4}, "a branch may warm up again"
    alone = read_curves([branch, trunks[0]], Reading(warmup_steps=2160))[0][0]
    assert "assumed to have its first learning rate" in alone.warnings[0]


def test_a_branch_without_a_trunk_is_told(tmp_path):
    trunk, branch = trunk_and_branch(tmp_path)
    (warning,) = one(branch).warnings
    assert "before 9,088, the first logged one, are assumed to be a warm-up from 0" in warning
    (warning,) = one(branch, warmup_steps=2160).warnings
    assert "begins at step 9,088, and the steps from the warm-up to there are assumed" in warning
    other = write(
        tmp_path / "other.csv", pandas.read_csv(trunk).assign(loss=lambda frame: frame.loss + 1)
    )
    curves, _ = read_curves([branch, other], Reading(warmup_steps=2160))
    assert any("begins at step 9,088" in w for w in curves[0].warnings), "its loss is another"
    for named, message in (
        ("nothing", "branches off 'nothing', which no curve is called, expected one of other"),
        ("other@20000", "branches off at step 20,000, expected at most 9,088"),
        ("branch", "branches off itself"),
    ):
        with pytest.raises(UserError, match=message):
            read_curves([branch, other], Reading(branch_of={"branch": named}))
    short = write(tmp_path / "short.csv", pandas.read_csv(trunk).head(20))
    with pytest.raises(UserError, match="its trunk short is known up to step 4,609 only"):
        read_curves([branch, short], Reading(branch_of={"branch": "short"}))


def test_the_manifest_of_the_published_curves():
    exact = read(CURVES / "csv_25")
    curves, _ = read_curves([CURVES / "curves.yaml"])
    assert [c.name for c in curves] == ["cosine_24000", "constant_24000", "drop"]
    for curve, name in zip(curves, FITTED, strict=True):
        assert np.array_equal(curve.lr, exact[name].lr)
        assert np.array_equal(curve.loss, exact[name].loss)
        assert (curve.parameters, curve.warnings) == (25e6, [])


def test_a_manifest_lists_curves(tmp_path):
    write(tmp_path / "logs/a.csv", {"it": STEPS, "ce": losses(), "rate": rates()})
    late = STEPS > 500
    write(tmp_path / "logs/b.csv", {"step": STEPS[late], "loss": losses()[late]} | {"lr": 1e-4})
    write(
        tmp_path / "logs/w.csv",
        {"Step": STEPS, "x - loss": losses() / math.log(2), "y - loss": losses()},
    )
    path = tmp_path / "curves.yaml"
    path.write_text(
        "curves:\n"
        "- {name: trunk, file: logs/a.csv, columns: {step: it, loss: ce, lr: rate},\n"
        "   parameters: 1e6, tokens_per_step: 512}\n"
        "- {name: branch, file: logs/b.csv, branch_of: trunk@500}\n"
        f"- {{name: other, file: logs/w.csv, run: x, unit: bits, schedule: {SCHEDULE}}}\n"
    )
    trunk, branch, other = read_curves([path])[0]
    assert [trunk.name, branch.name, other.name] == ["trunk", "branch", "other"]
    assert (branch.parameters, branch.tokens_per_step) == (1e6, 512)
    assert np.array_equal(branch.lr[:500], trunk.lr[:500])
    assert set(branch.lr[500:]) == {1e-4}
    assert np.allclose(other.loss, losses()[other.step[0] <= STEPS])
    for text, message in (
        ("curves: []", "curves is empty, expected a list of logs"),
        ("curves: [{name: a}]", r"curves\[0\]: file is missing, expected a log"),
        ("curves: [{file: none.csv}]", r"curves\[0\]: file: .*none.csv: no such"),
        ("curves: [{file: logs/a.csv, unit: words}]", "unit"),
        ("curves: [{file: logs/a.csv, parameters: -1}]", "parameters is -1"),
        ("curves: [{fil: logs/a.csv}]", "did you mean 'file'"),
        ("curves: [{name: a, file: 'logs/*.csv'}]", "names 3 files, expected no name or one file"),
        ("curves: [{name: a, file: logs/w.csv}]", "holds 2 runs, but is named 'a'"),
        ("curves: [{run: z, file: logs/w.csv}]", "has no run 'z', expected one of x, y"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_curves([path])
