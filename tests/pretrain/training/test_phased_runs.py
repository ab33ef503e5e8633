"""Runs in phases: equal to runs without where nothing changes, and resumed bit for bit."""

from __future__ import annotations

import copy
import re
import shutil
import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest

from evals.scaling.schedules import run_lr
from pretrain.checkpoint.state import read_state
from pretrain.checkpoint_folders import checkpoint_step, list_checkpoints
from pretrain.common.config_loader import to_yaml
from pretrain.common.errors import UserError
from pretrain.config.branch import BranchConfig
from pretrain.config.phases import PhaseConfig, PhaseData, PhaseSchedule
from pretrain.data.batches import PreparedData
from pretrain.run_directory import RunDirectory
from pretrain.training.trainer import Trainer
from tests.helpers.phased_runs import STEPS, configured, rows, three_phases
from tests.helpers.training_run import Run, whole_lines

pytestmark = pytest.mark.usefixtures("no_groups")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def phased(run, other_corpus, finished):
    """A finished run of three phases; it is trained once."""
    config = configured(run, three_phases(other_corpus))
    if not finished.exists():
        first = copy.deepcopy(config)
        first.directory = str(finished)
        assert Trainer(first).fit().status == "completed"
    shutil.copytree(finished, run.directory)
    return config


def test_phases_that_change_nothing_are_none(tmp_path, corpus):
    plain, phased = (Run(tmp_path, corpus, name, steps=6) for name in ("plain", "phased"))
    Trainer(configured(plain)).fit()
    same = [PhaseConfig(until=0.31), PhaseConfig(until=0.7, seq_len=32), PhaseConfig()]
    Trainer(configured(phased, same)).fit()
    marks = [r for r in rows(phased.directory) if "phase_begins" in r]
    assert [(r["step"], r["phase_begins"]) for r in marks] == [(0, 1), (3, 2), (7, 3)]
    others = [r for r in rows(phased.directory) if "phase_begins" not in r]
    assert [{k: v for k, v in r.items() if k != "phase"} for r in others] == rows(plain.directory)


@pytest.mark.parametrize("steps", [[3], pytest.param([1, 2, 4, 5, 6, 7], marks=pytest.mark.slow)])
def test_a_run_in_phases_goes_on_bit_for_bit_after_a_kill_at_any_step(run, phased, steps):
    """Killed after each checkpoint, those at borders too, with what it has logged since."""
    whole = rows(run.directory)
    borders = [(r["step"], r["tokens"], r["phase_name"]) for r in whole if "phase_begins" in r]
    assert borders == [(0, 0, "short"), (3, 384, "mixed"), (6, 768, "long")]
    logged = [r for r in whole if "loss" in r]
    assert [r["step"] for r in logged] == list(range(1, 9))
    assert [r["phase"] for r in logged] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert logged[-1]["tokens"] == 6 * 128 + 2 * 256
    assert logged[-1]["lr"] == pytest.approx(0.75e-2)
    killed = run.directory.with_name("killed")
    for step in steps:
        shutil.rmtree(killed, ignore_errors=True)
        shutil.copytree(run.directory, killed)
        for path in list_checkpoints(killed / "checkpoints"):
            if checkpoint_step(path) > step:
                shutil.rmtree(path)
        (killed / "checkpoints" / "latest").unlink(missing_ok=True)
        config = copy.deepcopy(phased)
        config.directory = str(killed)
        assert Trainer(config).fit().step == 8
        assert rows(killed) == whole, f"resumed after step {step}"


@pytest.mark.slow
def test_killed_where_a_phase_begins_it_goes_on_bit_for_bit(run, phased, tmp_path, corpus):
    killed = Run(tmp_path, corpus, "killed")
    config = copy.deepcopy(phased)
    config.directory = str(killed.directory)
    killed.config.write_text(to_yaml(config))
    process = killed.start()

    def has_begun():
        return any(row.get("phase_begins") == 2 for row in whole_lines(killed))

    killed.wait_until(process, has_begun)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    status, output = killed.finish()
    assert status == 0, output
    assert rows(killed.directory) == rows(run.directory)


def test_the_loss_on_every_source_and_mix_is_measured_in_every_phase(run, phased, corpus):
    found = [r for r in rows(run.directory) if "valid_loss" in r]
    assert [r["step"] for r in found] == [2, 4, 6, 8]
    for row in found:
        (other,) = (k for k in row if k.startswith("valid_loss/code@"))
        assert row["valid_loss@short"] == row["valid_loss@long"] == row["valid_loss/code"]
        assert row["valid_loss@short"] == row["valid_loss"]  # of the run's own data, as ever
        assert row["valid_loss@mixed"] == row[other] != row["valid_loss"]
    assert RunDirectory(run.directory).loss_plot.exists()
    log = RunDirectory(run.directory).log_file.read_text()
    assert "step 6: long begins, 3 of 3: 2 steps of 256 tokens in sequences of 64, learning " in log
    assert "documents cut: " in log


def test_phases_of_the_future_may_change_and_those_of_the_past_may_not(run, phased):
    checkpoints = run.directory / "checkpoints"
    for path in list_checkpoints(checkpoints):
        if checkpoint_step(path) > 4:
            shutil.rmtree(path)
    (checkpoints / "latest").unlink()
    before = rows(run.directory)

    def changed(number, **settings):
        config = copy.deepcopy(phased)
        for name, value in settings.items():
            setattr(config.phases[number], name, value)
        return Trainer(config)

    for number, settings, message in (
        (0, {"seq_len": 32}, r"train.seq_len \(of steps 1 to 3\) 16, the config says 32"),
        (1, {"data": None}, r"trained with data \(of steps 4 to 4\) code@.*, the config says code"),
        (0, {"until": 0.2}, r"borders of phases after step 3, the config says after step 2"),
        (1, {"global_batch_tokens": 64}, r"train.global_batch_tokens \(of steps 4 to 4\) 128"),
    ):
        with pytest.raises(UserError, match=message):
            changed(number, **settings).fit()
    config = copy.deepcopy(phased)
    config.phases[1].until = 0.7
    config.phases[2].global_batch_tokens = 128
    config.phases.insert(2, PhaseConfig(name="new", until=0.8, data=PhaseData(weights={"code": 2})))
    assert Trainer(config).fit().step == STEPS
    after = rows(run.directory)
    kept = [r for r in before if r["step"] <= 4]
    assert after[: len(kept)] == kept
    marks = [(r["step"], r["phase_name"]) for r in after if "phase_begins" in r]
    assert marks == [(0, "short"), (3, "mixed"), (7, "new"), (8, "long")]


@pytest.mark.parametrize(
    "ends",
    [
        {"until_tokens": 384},
        pytest.param({"until": 0.5}, marks=pytest.mark.slow),
        pytest.param({"steps": 4}, marks=pytest.mark.slow),
    ],
)
def test_a_run_in_phases_is_extended_as_it_says_at_its_end(run, ends):
    steps = ends.get("steps")
    config = configured(run, [PhaseConfig(until=0.5), PhaseConfig()])
    config.train.tokens, config.train.steps = (None, steps) if steps else (512, None)
    if "until_tokens" in ends:
        config.phases = [PhaseConfig(until_tokens=384), PhaseConfig(until_tokens=512)]
    Trainer(config).fit()
    log = RunDirectory(run.directory).log_file.read_text()
    border = config.plan.tokens_before(config.plan.phases[0].last)
    (said,) = re.findall(r"run the same command again; (.*) doubles the run", log)
    places = f"the ends of phases where they are (until_tokens {border} and none for the last)"
    assert said == ("train.steps=null " if steps else "") + f"train.tokens=1024 and {places}"
    config.train.steps, config.train.tokens = None, 1024
    config.phases = [PhaseConfig(until_tokens=border), PhaseConfig()]
    assert Trainer(config).fit().step == 8
    log = RunDirectory(run.directory).log_file.read_text()
    assert log.count("run the same command again; train.tokens=2048 doubles the run") == 1


def test_a_run_without_phases_goes_on_in_phases(run, other_corpus):
    Trainer(configured(run, steps=4, tokens=None)).fit()
    new = [
        PhaseConfig(until_tokens=512),
        PhaseConfig(until_tokens=768, data=PhaseData(path=str(other_corpus))),
        PhaseConfig(seq_len=64, micro_batch_size=1, schedule=PhaseSchedule()),
    ]
    last = Trainer(configured(run, new))
    last.fit()
    assert [(mix.seq_len, mix.window) for mix in last.batches.order.mixes] == [
        (32, 32),
        (32, 64),
        (64, 64),
    ]
    state = read_state(RunDirectory(run.directory).checkpoints / f"step-0000000{STEPS}")
    assert [phase["data.window"] for phase in state.phases] == [32, 64, 64]
    found = [r for r in rows(run.directory) if "loss" in r]
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    assert found[-1]["lr"] < found[5]["lr"] == 1e-2
    whole = rows(run.directory)  # and once more, of which the last steps are lost
    for step in (6, 7, 8, STEPS):
        shutil.rmtree(RunDirectory(run.directory).checkpoints / f"step-0000000{step}")
    (RunDirectory(run.directory).checkpoints / "latest").unlink()
    Trainer(configured(run, new)).fit()
    assert rows(run.directory) == whole


def test_a_rollback_over_a_border_skips_the_data_of_each_phase(run, phased):
    """What steps 3 (of the first phase) to 5 (of the second) have read comes no more."""
    from pretrain.training.spikes import roll_back

    trainer, engine = Trainer(phased), cast(Any, SimpleNamespace(forget_carried=lambda: None))
    checkpoints = RunDirectory(run.directory).checkpoints
    state = read_state(checkpoints / "step-00000005")
    trainer.config.train.spikes.rollback_steps, trainer.config.train.spikes.skip_steps = 2, 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.training.spikes.load_checkpoint", lambda *_, **__: None)
        patch.setattr("pretrain.training.spikes.on_main_process", lambda function: function())
        roll_back(trainer.config, engine, checkpoints, state)
    assert (state.step, state.data_offset) == (2, 4 * 128)
    assert state.offset == ((2, 128), (3, 3 * 128))


def test_best_fit_packing_trains_over_lengths_and_goes_on_bit_for_bit(run, other_corpus):
    """From a checkpoint within the second phase, and from the border after it."""
    config = configured(run, three_phases(other_corpus))
    config.data.packing = "best_fit"
    Trainer(config).fit()
    whole = rows(run.directory)
    for step in (4, 6):
        for path in list_checkpoints(RunDirectory(run.directory).checkpoints):
            if checkpoint_step(path) > step:
                shutil.rmtree(path)
        (RunDirectory(run.directory).checkpoints / "latest").unlink()
        Trainer(copy.deepcopy(config)).fit()
        assert rows(run.directory) == whole, step
    log = RunDirectory(run.directory).log_file.read_text()
    assert "% of their tokens are empty" in log
    concatenated = copy.deepcopy(config)
    concatenated.data.packing = "concatenate"
    with pytest.raises(UserError, match=r"data.packing \(.*\) best_fit, the config says conc"):
        Trainer(concatenated).fit()


def test_phases_of_another_tokenizer_are_refused(run, monkeypatch):
    config = configured(run, [PhaseConfig(until=0.5), PhaseConfig(data=PhaseData(path="other"))])
    from pretrain.training import phases

    def opened(settings, known):
        class Other:
            sha256 = "f" * 64

        return PreparedData(cast(Any, Other()), [], [], [], [], 0.0)

    monkeypatch.setattr(phases, "open_data", opened)
    with pytest.raises(UserError, match=r"phases\[1\].data was made with another tokenizer"):
        Trainer(config).fit()


def test_a_branch_reads_other_data_in_a_phase_of_its_own(run, other_corpus, tmp_path):
    trunk = configured(run, steps=4, tokens=None)
    Trainer(trunk).fit()
    decay = [
        PhaseConfig(until_tokens=512),
        PhaseConfig(data=PhaseData(path=str(other_corpus)), schedule=PhaseSchedule()),
    ]
    config = configured(run, decay)
    config.directory, config.branch = str(tmp_path / "branch"), BranchConfig(str(run.directory), 4)
    assert Trainer(config).fit().step == STEPS
    found = rows(tmp_path / "branch")
    assert [r["step"] for r in found if "loss" in r] == [5, 6, 7, 8, 9]
    assert [(r["step"], r["phase_begins"]) for r in found if "phase_begins" in r] == [(4, 2)]


def test_a_branch_of_a_trunk_in_phases_knows_its_tokens_and_rates(run, tmp_path):
    falling = PhaseSchedule(final_ratio=0.5)
    phases = [PhaseConfig(until=0.2), PhaseConfig(global_batch_tokens=256, schedule=falling)]
    trunk = configured(run, phases)
    Trainer(trunk).fit()
    plan, step = trunk.plan, trunk.plan.phases[1].first + 2
    config = configured(run, phases)
    config.directory = str(tmp_path / "branch")
    config.branch = BranchConfig(str(run.directory), tokens=plan.tokens_before(step))
    assert config.first_step == step
    Trainer(config).fit()
    branch = RunDirectory(tmp_path / "branch")
    assert branch.read_parent()["tokens"] == plan.tokens_before(step)
    rates = [plan.learning_rate(number) for number in range(step)]
    assert rates[-1] < max(rates)
    assert run_lr(config, branch)[:step].tolist() == rates
