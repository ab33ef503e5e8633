"""``Trainer`` in a process of one's own: callbacks, threads, repetition, and what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pretrain.common.config_loader import ConfigError
from pretrain.common.errors import UserError
from pretrain.config import ParallelConfig, RunConfig, load_run_config
from pretrain.parallel.processes import process_groups, start_processes
from pretrain.run_directory import RunDirectory
from pretrain.training.callbacks import Callback, Decision, Profiler, default_callbacks
from pretrain.training.trainer import Trainer
from tests.helpers.processes import ENVIRONMENT, ROOT, run_interpreter
from tests.helpers.training_run import QUICK, Run

pytestmark = pytest.mark.usefixtures("no_groups")


class Recorder(Callback):
    """Keeps the hooks that were called."""

    def __init__(self):
        self.called = []

    def on_fit_start(self):
        assert dist.is_initialized()
        self.called.append("fit start")

    def on_train_start(self):
        self.called.append(f"train start {self.trainer.state.step}")

    def before_step(self):
        self.called.append("before")

    def after_step(self, result):
        self.called.append(f"after {self.trainer.state.step} {result.applied}")

    def on_log(self, metrics):
        metrics["twice_the_loss"] = 2 * metrics["loss"]

    def between_steps(self):
        self.called.append("between")

    def after_save(self):
        self.called.append(f"save {self.trainer.state.step}")

    def on_stop(self):
        self.called.append("stop")

    def on_complete(self):
        self.called.append("complete")

    def on_fit_end(self, result):
        self.called.append(f"fit end {result.status}")

    def on_exception(self, error):
        self.called.append(f"exception {error}")


def test_hooks_are_called_in_their_order_and_may_log(run):
    recorder = Recorder()
    result = Trainer(run.config, overrides=QUICK, callbacks=[recorder]).fit()
    steps = [
        ["before", f"after {n} True", *([f"save {n}"] if n % 2 == 0 else []), "between"]
        for n in (1, 2, 3, 4)
    ]
    assert recorder.called == [
        "fit start",
        "train start 0",
        *[name for step in steps for name in step],
        "complete",
        "fit end completed",
    ]
    rows = [row for row in run.metrics if "loss" in row]
    assert [row["twice_the_loss"] for row in rows] == [2 * row["loss"] for row in rows]
    assert (result.status, result.exit_status, result.step, result.tokens) == (
        "completed",
        0,
        4,
        512,
    )
    assert result.loss == rows[-1]["loss"]
    assert result.directory.path == run.directory


def test_a_run_stopped_from_another_thread_continues_in_the_same_process(run, tmp_path, corpus):
    """Signals reach the main thread alone; a request stops a run on any."""
    expected = Run(tmp_path, corpus, "expected", steps=4)
    assert Trainer(expected.config, overrides=QUICK).fit().status == "completed"

    class StopAtTwo(Callback):
        def before_step(self):
            if self.trainer.state.step == 1:
                self.trainer.request_stop("a user")

    stopping = Trainer(run.config, overrides=QUICK, callbacks=[StopAtTwo()])
    results = []
    thread = threading.Thread(target=lambda: results.append(stopping.fit()))
    thread.start()
    thread.join()
    (result,) = results
    assert (result.status, result.exit_status, result.step) == ("stopped", 75, 2)
    log = RunDirectory(run.directory).log_file.read_text()
    assert "stopped by a user after step 2, saved" in log
    again = Trainer(run.config, overrides=QUICK).fit()
    assert (again.status, again.step) == ("completed", 4)
    # A run that stops does not validate.
    losses, others = ([row for row in r.losses if "loss" in row] for r in (run, expected))
    assert losses == others
    assert Trainer(run.config, overrides=QUICK).fit().loss is None, "nothing was left to do"


def test_process_groups_are_left_only_by_whom_they_were_made(run):
    Trainer(run.config, overrides=QUICK).fit()
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    assert not RunDirectory(run.directory).is_locked()
    linear = torch.nn.functional.linear
    with process_groups(ParallelConfig()):
        torch.nn.functional.linear = lambda x, *_: x  # as DeepSpeed's ZeRO-3 does
    assert torch.nn.functional.linear is linear
    start_processes()
    group = dist.group.WORLD
    Trainer(run.config, overrides=[*QUICK, "train.steps=5"]).fit()
    assert dist.group.WORLD is group
    assert parallel_state.model_parallel_is_initialized()


def test_what_a_callback_raises_reaches_the_caller_and_leaves_nothing(run):
    class Failing(Callback):
        def after_step(self, result):
            raise UserError("enough")

    recorder = Recorder()
    trainer = Trainer(run.config, overrides=QUICK, callbacks=[recorder, Failing()])
    with pytest.raises(UserError, match="enough"):
        trainer.fit()
    assert recorder.called[-1] == "exception enough"
    assert not dist.is_initialized()
    assert not RunDirectory(run.directory).is_locked()
    with pytest.raises(UserError, match=r"holds no manifest.json"):
        Trainer(run.config, overrides=["data.path=nowhere"]).fit()


def test_a_callback_skips_updates_and_gives_up(run):
    class Picky(Callback):
        def skip_update(self, loss):
            return self.trainer.state.step == 1

        def after_step(self, result):
            return Decision.GIVE_UP if self.trainer.state.step == 3 else None

    result = Trainer(run.config, overrides=QUICK, callbacks=[Picky()]).fit()
    assert (result.status, result.exit_status, result.step) == ("non_finite", 3, 3)
    assert [row["step"] for row in run.metrics if "loss" in row] == [1, 3]
    assert run.metrics[-1]["skipped"] == 1
    with pytest.raises(ConfigError, match="Picky skips updates, which DeepSpeed cannot"):
        Trainer(run.config, overrides=["parallel.zero_backend=deepspeed"], callbacks=[Picky()])


def test_a_run_config_is_as_good_as_its_file(run):
    config = load_run_config(run.config, QUICK)
    assert isinstance(config, RunConfig)
    assert Trainer(config).fit().status == "completed"
    with pytest.raises(ConfigError, match="expected none beside a RunConfig"):
        Trainer(config, overrides=["seed=1"])
    config.train.steps = None
    with pytest.raises(ConfigError, match="expected exactly one of them to be set"):
        Trainer(config)


MODULE = """
from pretrain.training.callbacks import Callback

class Report(Callback):
    def on_log(self, metrics):
        metrics["mine"] = self.trainer.state.step

class WithArguments(Callback):
    def __init__(self, number):
        pass

def function():
    pass
"""


@pytest.mark.slow
def test_a_line_of_the_config_adds_a_callback_of_the_user(run, tmp_path):
    (tmp_path / "my_callbacks.py").write_text(MODULE)
    command = [sys.executable, "-m", "pretrain", str(run.config), *QUICK, "callbacks=[NAME]"]
    done = subprocess.run(
        [word.replace("NAME", "my_callbacks.Report") for word in command],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [row["mine"] for row in run.metrics if "loss" in row] == [1, 2, 3, 4]


def test_a_callback_that_does_not_exist_is_named(run, tmp_path, monkeypatch):
    (tmp_path / "some_callbacks.py").write_text(MODULE)
    (tmp_path / "broken_callbacks.py").write_text("import nothing_of_the_kind")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, message in (
        ("Report", "expected MODULE.CLASS"),
        ("some_callbacks.", "expected MODULE.CLASS"),
        ("no_module.Report", r"no_module cannot be imported \(ModuleNotFoundError"),
        ("broken_callbacks.X", "broken_callbacks cannot be imported .*nothing_of_the_kind"),
        ("some_callbacks.Missing", "some_callbacks has no Missing"),
        ("some_callbacks.function", "expected a subclass of pretrain.Callback"),
        ("some_callbacks.WithArguments", "cannot be made without arguments"),
    ):
        with pytest.raises(ConfigError, match=f"callbacks names '{name}',.* {message}"):
            Trainer(run.config, overrides=[f"callbacks=[{name}]"])


def test_what_after_step_measures_is_logged_for_the_same_step(run):
    class Measure(Callback):
        measured = -1

        def after_step(self, result):
            self.measured = self.trainer.state.step

        def on_log(self, metrics):
            metrics["measured"] = self.measured

    class SeeAll(Callback):
        def __init__(self):
            self.seen = 0

        def skip_update(self, loss):
            self.seen += 1
            return self.seen == 2

    both = [SeeAll(), SeeAll()]
    Trainer(run.config, overrides=QUICK, callbacks=[Measure(), *both]).fit()
    rows = [row for row in run.metrics if "loss" in row]
    assert [(row["step"], row["measured"]) for row in rows] == [(1, 1), (3, 3), (4, 4)]
    assert [each.seen for each in both] == [4, 4], "one that skips does not hide the loss"


def test_the_profiler_writes_a_trace(run):
    Trainer(run.config, overrides=QUICK, callbacks=[Profiler(2, 3)]).fit()
    path = RunDirectory(run.directory).profiles / "steps-2-3-rank-0.json"
    assert json.loads(path.read_text())["traceEvents"]


def test_tensorboard_has_the_metrics(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = [*QUICK, "logging.tensorboard=true"]
    Trainer(run.config, overrides=[*overrides, "train.steps=2"]).fit()
    Trainer(run.config, overrides=overrides).fit()
    events = EventAccumulator(str(RunDirectory(run.directory).tensorboard))
    events.Reload()
    for name in ("loss", "lr", "grad_norm", "tokens", "valid_loss", "valid_bits_per_byte"):
        expected = [(row["step"], row[name]) for row in run.metrics if row.get(name) is not None]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected], name


def test_the_order_of_the_default_callbacks(run):
    config = load_run_config(run.config, ["train.spikes.policy=skip"])
    assert [type(callback).__name__ for callback in default_callbacks(config)] == [
        "WatchProcesses",
        "SkipSpikes",
        "FindOrigin",
        "StopNonFinite",
        "TellTimeLeft",
        "LogSteps",
        "NameSlowestRank",
        "Validate",
        "Save",
        "Sample",
        "Summary",
    ]


def test_importing_it_imports_nothing_that_is_needed_later_or_never():
    code = """
import sys
from pretrain import Trainer
heavy = ("torch._dynamo", "matplotlib", "pandas", "megatron", "torch.distributed.checkpoint")
print([module for module in heavy if module in sys.modules])
"""
    assert run_interpreter("-c", code) == (0, "[]\n")


def test_megatron_and_deepspeed_are_imported_without_what_a_cpu_has_no_use_for():
    code = """
import sys
from pretrain.parallel.cpu import importing_megatron
with importing_megatron():
    import megatron.core.optimizer
heavy = ("torch._dynamo", "triton", "torch.utils.tensorboard")
print([module for module in heavy if module in sys.modules])
import torch.utils.tensorboard
from pretrain.optim.backends.deepspeed import _import_deepspeed
_import_deepspeed()
import deepspeed.runtime.zero.muon.muon_optimizer
print("torch._inductor.compile_fx" in sys.modules)
"""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    pytest.importorskip("tensorboard")
    pytest.importorskip("deepspeed")
    environment = {**ENVIRONMENT, "PYTHONWARNINGS": "ignore"}
    assert run_interpreter("-c", code, environment=environment) == (0, "[]\nFalse\n")
