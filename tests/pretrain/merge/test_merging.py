"""Merged checkpoints: their numbers, what can be done with them, and what cannot be merged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.inference.load import load_model
from pretrain.merge.command import main, merge, plan_merge
from pretrain.parallel.processes import start_processes, stop_processes
from pretrain.training.trainer import Trainer
from tests.helpers.processes import run_interpreter
from tests.helpers.training_run import QUICK, Run

KEPT = ("schedule.kind=constant", "checkpoint.keep_last=9", "train.steps=8")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, corpus):
    """Eight steps at a constant rate, saved every second one."""
    return trained(tmp_path_factory.mktemp("trunk"), corpus)


def trained(folder, corpus, *overrides):
    stop_processes()  # of other tests: a Trainer makes its own
    run = Run(folder, corpus, "run", steps=8)
    Trainer(run.config, overrides=[*QUICK, *KEPT, *overrides]).fit()
    return run


def weights_at(run, step):
    found = load_model(run.directory / f"checkpoints/step-{step:08d}").model
    return {name: p.detach().double() for name, p in found.named_parameters()}


def expected(run, steps, weights):
    parts = [weights_at(run, step) for step in steps]
    return {n: sum(w * p[n] for w, p in zip(weights, parts, strict=True)) for n in parts[0]}


def check(found, wanted):
    """Rounded once: to within the last bit of float32."""
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), wanted[name], rtol=2**-23, atol=0)


def test_a_merge_is_a_checkpoint(trunk, tmp_path, corpus, capsys):
    before = sorted(path for path in trunk.directory.rglob("*") if path.is_file())
    out = tmp_path / "merged"
    early = str(trunk.directory / "checkpoints/step-00000004")
    options = ["--last", "3", "--out", str(out), "--against", early]
    assert main([str(trunk.directory), *options]) == 0
    shown = capsys.readouterr().out
    assert sorted(path for path in trunk.directory.rglob("*") if path.is_file()) == before
    merged = load_model(out)
    check(merged.model, expected(trunk, (4, 6, 8), [1 / 3] * 3))
    assert merged.state.step == 8 and merged.state.precision == "float32"

    noted = json.loads((out / "merge.json").read_text())
    assert noted["steps"] == [4, 6, 8] and noted["tokens"] == 8 * 128
    found = noted["validation"]
    # That of the last checkpoint is the run's own.
    own = [row["valid_loss"] for row in trunk.metrics if "valid_loss" in row][-1]
    assert found["last"][0] == pytest.approx(own, rel=1e-5)
    assert found["difference"][0] == pytest.approx(found["merged"][0] - found["last"][0])
    assert found["windows"] == 128 // 32 and found["merged"][1] > 0
    assert f"validation   {found['merged'][0]:.4f} ± {found['merged'][1]:.4f} nats" in shown
    beside = found["against"][early]
    measured = {row["step"]: row["valid_loss"] for row in trunk.metrics if "valid_loss" in row}
    assert beside["loss"][0] == pytest.approx(measured[4], rel=1e-5)
    assert beside["difference"][0] == pytest.approx(found["merged"][0] - beside["loss"][0])
    assert f"{beside['loss'][0]:.4f} of {early}, difference" in shown

    other = Run(tmp_path, corpus, "other", steps=2)
    stop_processes()
    trainer = Trainer(other.config, overrides=[*QUICK, f"initialize.checkpoint={out}"])
    assert trainer.fit().status == "completed"
    again = Run(tmp_path, corpus, "merged", steps=9)
    with pytest.raises(UserError, match="does not fit the model"):
        Trainer(again.config, overrides=[*QUICK, *KEPT[:1]]).fit()


@pytest.mark.parametrize(
    ("options", "steps", "weights"),
    [
        ({"rule": "linear"}, (2, 4, 6, 8), [0.1, 0.2, 0.3, 0.4]),
        (
            {"rule": "inverse-decay", "steps": [8, 2, 4], "final_ratio": 0.0},
            (2, 4, 8),
            # Shares of the six steps: 1, 5/6; 4/6, 3/6, 2/6, 1/6.
            [1 - 11 / 12, 11 / 12 - 10 / 24, 10 / 24],
        ),
    ],
)
def test_each_rule(trunk, tmp_path, options, steps, weights):
    start_processes()
    planned = plan_merge(trunk.directory, **options)
    assert planned.weights == pytest.approx(weights)
    _, model = merge(planned, tmp_path / "merged")
    check(model, expected(trunk, steps, planned.weights))


def test_the_shape_is_that_of_the_run(trunk):
    shaped = plan_merge(trunk.directory, rule="inverse-decay")
    assert (shaped.decay, shaped.final_ratio) == ("linear", 0.1)
    assert shaped.name == "inverse-decay-linear-0.1-4-of-2-8"


def test_low_precision_is_merged_by_its_float32_copies(tmp_path, corpus):
    run = trained(tmp_path, corpus, "train.precision=bf16")
    start_processes()
    _, model = merge(plan_merge(run.directory, last=2), tmp_path / "merged")
    rounded = expected(run, (6, 8), [0.5, 0.5])
    differences, apart = 0, 0.0
    for name, parameter in model.named_parameters():
        difference = (parameter.detach().double() - rounded[name]).abs()
        differences += int((difference > 0).sum())
        apart = max(apart, float(difference.max()))
        assert parameter.dtype == torch.float32
    assert differences > 100, "more than the average of rounded weights"
    assert apart < 2**-8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--last", "1"],
            r"--last is 1, expected at least two of the run's 4 checkpoints: 2, 4, 6,",
        ),
        (["--last", "5"], r"--last is 5, expected at least two of the run's 4 checkpoints"),
        (["--steps", "4", "5"], r"--steps is \[4, 5\], expected at least two of .*: 2, 4, 6, 8"),
        (["--steps", "4", "4"], r"--steps is \[4, 4\], expected at least two"),
        (["--decay", "sqrt"], r"--decay is sqrt, which is of --weights inverse-decay alone"),
        (
            ["--weights", "inverse-decay", "--final-ratio", "1"],
            r"--final-ratio is 1, expected at le",
        ),
        (
            ["--weights", "inverse-decay", "--decay", "exponential", "--final-ratio", "0"],
            r"--final-ratio is 0, expected above 0 and below 1",
        ),
        (["--against", "nothing"], r"no checkpoint at nothing: expected a run directory"),
        (["--out", "."], r"--out is \., which already exists; expected a new folder"),
    ],
)
def test_bad_options_are_one_sentence(trunk, arguments, message):
    with pytest.raises(UserError, match=message):
        main([str(trunk.directory), *arguments])


def test_what_cannot_be_merged(trunk, tmp_path, corpus):
    with pytest.raises(
        UserError, match=r"has the checkpoints of these steps: none; expected at le"
    ):
        plan_merge(tmp_path / "nothing")
    decayed = trained(tmp_path, corpus, "schedule.kind=wsd", "schedule.decay_fraction=0.5")
    message = r"learning rate goes from 0\.01 to \S+ between steps 2 and 8, expected a constant one"
    with pytest.raises(UserError, match=message):
        plan_merge(decayed.directory, rule="inverse-decay")
    assert plan_merge(decayed.directory, rule="inverse-decay", steps=[2, 4]).weights
    (decayed.directory / "checkpoints/step-00000006/__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-00000006 is damaged: __0_0.distcp has 0 bytes"):
        merge(plan_merge(decayed.directory), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_checkpoints_of_two_processes_are_merged(trunk, tmp_path, corpus):
    """Tensor-parallel ones, whose tensors lie in parts: the same merge as of one process."""
    run = Run(tmp_path, corpus, "shared", steps=8)
    output = run_interpreter(
        *("-m", "pretrain.parallel.torchrun", "--standalone", "--nproc-per-node=2"),
        *("-m", "pretrain", run.config, *QUICK, *KEPT, "parallel.tensor=2"),
    )
    assert (run.directory / "checkpoints/step-00000008").is_dir(), output
    start_processes()
    found = []
    for number, each in enumerate((trunk, run)):
        _, model = merge(plan_merge(each.directory), tmp_path / str(number))
        check(model, expected(each, (2, 4, 6, 8), [0.25] * 4))
        found.append(np.concatenate([p.detach().flatten() for p in model.parameters()]))
    assert np.abs(found[0] - found[1]).max() < 1e-4
