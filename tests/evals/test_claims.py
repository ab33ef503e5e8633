"""Claims are decided by criteria that can fail, resumed where they stopped, and read from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from evals.synthetic import __main__ as synthetic
from evals.synthetic.claims import command
from evals.synthetic.claims.checks import annealing_law, para_rnn
from evals.synthetic.claims.judging import judge, measures_of
from evals.synthetic.claims.schema import Claim, claim_names, load_claim, reduced_claim
from evals.synthetic.settings import SyntheticConfig
from evals.synthetic.training import learning_rate, run
from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError

SMALL = """
claim: longer training is better
source: none
minutes: 0.1
seeds: [0, 1]
settings: {task: parity, pattern: gru, hidden_size: 8, length: 8, test_rows: 8, batch_size: 4}
arms: {short: {steps: 1}, long: {steps: 2}}
holds: HOLDS
"""
ONE = '[{arm: short, measure: "loss 1x", at_most: 9}]'
REDUCED = ["counting", "delta-product-s3", "nonlinear-state-tracking", "parity-eigenvalues"]


@pytest.fixture
def alone(monkeypatch):
    """Let the command use the process groups of the tests."""
    for module in (command, synthetic):
        monkeypatch.setattr(module, "stop_processes", lambda: None)


def write(folder: Path, monkeypatch, holds: str, text: str = SMALL) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(text.replace("HOLDS", holds))
    monkeypatch.setattr(command, "load_claim", lambda name: load_claim(name, folder))


def test_every_claim_can_be_read_and_is_affordable():
    names = claim_names()
    assert len(names) >= 15
    for name in names:
        claim = load_claim(name)
        assert claim.minutes <= 20 and claim.source and claim.note, name
        configs = []
        if claim.check is None:
            configs = [claim.config(arm, 1, name) for arm in claim.arms]
        for config in configs:
            lengths = [f"{factor}x" for factor in config.test_factors]
            passes = [f", {n} passes" for n in config.test_recurrences] or [""]
            scores = ("accuracy", "rows", "last", "loss", "tail_loss", "end_loss")
            known = {f"{s} {x}{p}" for s in scores for x in lengths for p in passes}
            known |= {"window", "final loss"}
            arms = [arm for arm in claim.arms if claim.config(arm, 1, name) == config]
            for criterion in claim.holds:
                if criterion.arm in arms:
                    named = {criterion.measure, criterion.minus_measure or criterion.measure}
                    assert named <= known, (name, named - known)


def test_claims_are_listed_with_their_cost_and_criteria(capsys):
    assert synthetic.main(["claim", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == claim_names()
    claim = load_claim("para-rnn")
    at = lines.index(f"para-rnn: {claim.claim}")
    assert claim.source in lines[at + 1] and "CPU minutes, 2 arms by 1 seeds" in lines[at + 1]
    assert lines[at + 2] == "  holds if ParaGRU: error is at most 1e-09"


def test_a_claim_holds_fails_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys, alone):
    write(tmp_path / "files", monkeypatch, '[{arm: long, measure: "loss 1x", at_least: 0.0}]')
    output = ["claim", "small", "--output", str(tmp_path / "out")]
    assert synthetic.main(output) == 0
    folder = tmp_path / "out" / "small"
    times = {path: path.stat().st_mtime_ns for path in folder.glob("parity-*.json")}
    assert len(times) == 4
    assert (folder / "small.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "holds: long: loss 1x is at least 0" in shown and "small: longer training" in shown

    # Another criterion on the same runs, which are not made again.
    write(tmp_path / "files", monkeypatch, '[{arm: long, measure: "loss 1x", at_most: 0.0}]')
    assert synthetic.main(output) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.glob("parity-*.json")} == times
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["held"] is False and len(outcome["verdicts"][0]["values"]) == 2
    assert "FAILS" in capsys.readouterr().out


def test_criteria_count_seeds_and_differences():
    text = SMALL.replace(
        "HOLDS",
        "[{arm: long, measure: a, at_least: 2, seeds: 1}, {arm: long, measure: a, at_least: 2},"
        " {arm: long, minus_arm: short, measure: a, at_most: 1},"
        " {arm: long, measure: b, minus_measure: a, at_least: 0}]",
    )
    claim = build_config(Claim, yaml.safe_load(text), "text")
    found = {
        "short": {0: {"a": 1.0, "b": 0.0}, 1: {"a": 0.0, "b": 0.0}},
        "long": {0: {"a": 2.0, "b": 3.0}, 1: {"a": 1.0, "b": 0.5}},
    }
    verdicts = judge(claim, found)
    assert [v.held for v in verdicts] == [True, False, True, False]
    assert [v.values for v in verdicts] == [[2, 1], [2, 1], [1, 1], [1, -0.5]]
    with pytest.raises(UserError, match="there is no measure 'b', expected one of: a"):
        judge(claim, {arm: {0: {"a": 2.0}, 1: {"a": 2.0}} for arm in found})


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCED)
def test_reduced_claims_hold_and_with_arms_exchanged_they_do_not(name, tmp_path, alone):
    assert synthetic.main(["claim", name, "--reduced", "--output", str(tmp_path)]) == 0
    outcome = json.loads((tmp_path / f"{name}-reduced" / "outcome.json").read_text())
    claim, arms = reduced_claim(load_claim(name), name), [*outcome["measures"]]
    assert arms == [*claim.arms]
    first, *others = outcome["measures"].values()
    found = dict(zip(arms, [*others, first], strict=True))
    verdicts = judge(claim, {a: {int(s): m for s, m in by.items()} for a, by in found.items()})
    assert not all(verdict.held for verdict in verdicts)


@pytest.mark.slow
def test_newtons_method_equals_stepping_as_claimed():
    """The claim para-rnn without its times: machines of tests are shared."""
    claim = load_claim("para-rnn")
    for arm, settings in claim.arms.items():
        measures = para_rnn({**claim.settings, **settings, "lengths": [64, 300]}, 1, run)
        (bound,) = [c.at_most for c in claim.holds if c.arm == arm and c.measure == "error"]
        assert bound is not None and 0 < measures["error"] <= bound


def test_a_reduced_claim_has_the_criteria_of_its_arms():
    text = SMALL.replace("HOLDS", '[{arm: long, measure: "loss 1x", at_most: 9, seeds: 2}]')
    text += "reduced: {minutes: 0.1, seeds: [1], settings: {length: 4}, arms: [long]}"
    claim = build_config(Claim, yaml.safe_load(text), "text")
    small = reduced_claim(claim, "text")
    assert [*small.arms] == ["long"] and small.seeds == [1] and small.holds[0].seeds == 1
    config = small.config("long", 1, "text")
    assert (config.length, config.steps, config.hidden_size) == (4, 2, 8)


def test_the_annealing_law_is_fitted_to_some_schedules_and_tested_on_another():
    """Losses that follow the law exactly are predicted, and the control is off."""

    def train(config: SyntheticConfig) -> dict:
        rates = [learning_rate(config, step) for step in range(config.steps)]
        area, annealed, momentum, losses = 0.0, 0.0, 0.0, []
        for before, rate in zip([rates[0], *rates[:-1]], rates, strict=True):
            area += rate
            momentum = 0.999 * momentum + max(before - rate, 0)
            annealed += momentum
            losses.append(2 + 0.5 * area**-0.5 - 0.4 * annealed)
        return {"losses": losses}

    claim = load_claim("annealing-law")
    errors = {
        arm: annealing_law({**claim.settings, **settings}, 1, train)
        for arm, settings in claim.arms.items()
    }
    assert errors["law"]["error"] < 0.01
    assert errors["law"]["end error"] < 0.5 * errors["no law"]["end error"]


@pytest.mark.usefixtures("processes")
def test_measures_of_a_loop_and_of_windows():
    loop = SyntheticConfig(
        "attn",
        "bytes",
        {"attn": {"num_heads": 2}},
        hidden_size=8,
        length=8,
        recursion={"times": 3, "sampling": "poisson", "adapter": True, "state_init": "random"},
        test_recurrences=[1, 4],
        test_factors=[1, 8],
        steps=2,
        test_rows=2,
    )
    result = run(loop)
    again = run(loop)
    assert result["tests"] == again["tests"] and result["losses"] == again["losses"]
    measures = measures_of(result)
    assert measures["loss 8x, 4 passes"] != measures["loss 8x, 1 passes"] > 0
    windows = SyntheticConfig(
        "gru",
        "n_parity",
        hidden_size=32,
        window=4,
        window_curriculum="cumulative",
        steps=200,
        lr=1e-2,
        length=16,
        batch_size=64,
        init_std=0.1,
        test_factors=[1],
    )
    assert measures_of(run(windows))["window"] >= 2


@pytest.mark.parametrize(
    ("holds", "message"),
    [
        ("[{arm: lang, measure: x, at_least: 1}]", r"holds\[0\]: there is no arm 'lang' .did you"),
        ("[{arm: long, measure: x}]", "expected exactly one of at_least and at_most"),
        ("[{arm: long, measure: x, at_most: 1, seeds: 3}]", "seeds is 3, expected at most 2"),
        ("[]", "expected at least one each of arms, holds and seeds"),
        (f"{ONE}\nreduced: {{minutes: 1, seeds: [5]}}", r"reduced.seeds is .5., expected some of"),
        (f"{ONE}\nreduced: {{minutes: 1, seeds: [0], arms: [lng]}}", r"names 'lng' .did you mean"),
        (f"{ONE}\nreduced: {{minutes: 1, seeds: [0], arms: [long]}}", "no criterion is left"),
    ],
)
def test_a_wrong_claim_is_one_sentence(tmp_path, monkeypatch, holds, message):
    write(tmp_path, monkeypatch, holds)
    with pytest.raises(UserError, match=message) as caught:
        command.main(["small"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["claim", "n-parity", "--reduced"], "'n-parity' has no reduced form, expected one of: c"),
        (["claim", "n-party"], "there is no claim 'n-party' .did you mean 'n-parity'"),
        (["table", "--out", "x.md", "--mixers", "gruu"], "--mixers names 'gruu' .did you mean"),
        (["table", "--out", "x.md", "--tasks", "s4"], "--tasks names 's4'.*no task of the table"),
    ],
)
def test_wrong_names_are_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message):
        synthetic.main(arguments)
