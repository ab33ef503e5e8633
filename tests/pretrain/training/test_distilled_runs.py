"""Runs that learn from a teacher: resumed bit for bit, and from a cache as beside it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json

import pytest

from pretrain.checkpoint.state import read_state
from pretrain.common.errors import UserError
from pretrain.config import ConfigError, DistillConfig, InitializeConfig, load_run_config
from pretrain.config.distill import PhaseDistill
from pretrain.config.phases import PhaseConfig
from pretrain.inference.load import load_model
from pretrain.model.counts import count_model
from pretrain.planner.estimate import Planner
from pretrain.planner.hardware import load_hardware
from pretrain.run_directory import find_checkpoint
from pretrain.training.cache_teacher import main, write_cache
from pretrain.training.callbacks import Callback
from pretrain.training.distilling import open_teacher
from pretrain.training.teacher_cache import step_file
from pretrain.training.trainer import Trainer
from tests.helpers import processes
from tests.helpers.training_run import Run

pytestmark = pytest.mark.usefixtures("no_groups")
STEPS = 6


class StopAt(Callback):
    """Stops after a step."""

    def __init__(self, step):
        self.step = step

    def between_steps(self):
        self.trainer.stopping |= self.trainer.state.step == self.step


def settings(run, pattern="gdn attn", **distill):
    config = load_run_config(run.config)
    config.model.pattern, config.train.steps = pattern, STEPS
    config.sample.tokens, config.validation.every = 0, 0
    if distill:
        config.distill = DistillConfig(**distill)
    return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, corpus):
    run = Run(tmp_path_factory.mktemp("teacher"), corpus, "teacher", steps=STEPS)
    config = settings(run, "attn attn")
    config.directory = str(run.directory)
    assert Trainer(config).fit().status == "completed"
    return run.directory


def student(run, teacher, **distill):
    values = {"align_steps": 0.5, "weight": 0.7, **distill}
    return settings(run, teacher=str(teacher), **values)


def at(config, folder, **changes):
    config = copy.deepcopy(config)
    config.directory = str(folder)
    for name, value in changes.items():
        setattr(config.distill, name, value)
    return config


def rows(folder):
    text = (folder / "metrics.jsonl").read_text()
    names = ("step", "loss", "grad_norm", "distill_kl", "cross_entropy", "align_loss", "valid_loss")
    return [{k: v for k, v in json.loads(x).items() if k in names} for x in text.splitlines()]


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_a_run_aligns_then_learns_and_resumes_bit_for_bit(run, teacher, tmp_path):
    config, before = student(run, teacher), digest(teacher)
    assert Trainer(at(config, tmp_path / "whole")).fit().status == "completed"
    assert digest(teacher) == before
    whole = [row for row in rows(tmp_path / "whole") if "loss" in row]
    assert ["align_loss" in row for row in whole] == [True] * 3 + [False] * 3
    assert all(
        row["loss"] == pytest.approx(0.7 * row["distill_kl"] + 0.3 * row["cross_entropy"], rel=1e-5)
        for row in whole[3:]
    )
    halted = at(config, tmp_path / "halted")
    for step in (2, 4):
        assert Trainer(halted, callbacks=[StopAt(step)]).fit().status == "stopped"
    assert Trainer(halted).fit().status == "completed"
    assert rows(tmp_path / "halted") == rows(tmp_path / "whole")


def test_phases_say_when_it_aligns(run, teacher, tmp_path):
    config = student(run, teacher)
    assert Trainer(at(config, tmp_path / "steps")).fit().status == "completed"
    config.distill = DistillConfig(str(teacher))
    config.phases = [
        PhaseConfig(until=0.5, distill=PhaseDistill(align=True)),
        PhaseConfig(distill=PhaseDistill(weight=0.7)),
    ]
    assert Trainer(at(config, tmp_path / "phases")).fit().status == "completed"
    steps, phases = (
        [row for row in rows(tmp_path / name) if "loss" in row] for name in ("steps", "phases")
    )
    assert phases == steps


def test_a_student_that_begins_as_its_teacher(run, teacher, tmp_path):
    config = settings(run, "attn attn", teacher=str(teacher))
    config.initialize = InitializeConfig(str(teacher))
    assert Trainer(at(config, tmp_path / "same")).fit().status == "completed"
    first = rows(tmp_path / "same")[0]
    assert "align_loss" not in first  # there is no new mixer
    assert first["distill_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_cache_of_all_ids_is_the_teacher(run, teacher, tmp_path, reverse):
    import torch

    config = student(run, teacher, align_steps=0.0, temperature=1.5, reverse=reverse)
    assert Trainer(at(config, tmp_path / "beside")).fit().status == "completed"
    cached = at(config, tmp_path / "cached", cache=str(tmp_path / "cache"), top_k=10**6)
    assert write_cache(cached, tmp_path / "cache", torch.float32) == STEPS
    assert Trainer(cached).fit().status == "completed"
    for mine, theirs in zip(rows(tmp_path / "cached"), rows(tmp_path / "beside"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_writing_a_cache_goes_on_where_it_was_interrupted(run, teacher, tmp_path):
    config = student(run, teacher, align_steps=0.0, cache=str(tmp_path / "cache"), top_k=8)
    assert write_cache(config, tmp_path / "cache") == STEPS
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    step_file(tmp_path / "cache", 2).unlink()
    with pytest.raises(UserError, match=r"has no step 3 of the run's 6"):
        Trainer(at(config, tmp_path / "short")).fit()
    assert write_cache(config, tmp_path / "cache") == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "cache").iterdir()} == before
    for step in (2, None):
        ends = [] if step is None else [StopAt(step)]
        Trainer(at(config, tmp_path / "halted"), callbacks=ends).fit()
    assert Trainer(at(config, tmp_path / "whole")).fit().status == "completed"
    assert rows(tmp_path / "halted") == rows(tmp_path / "whole")


def test_a_cache_of_something_else_is_refused(run, teacher, tmp_path):
    config = student(run, teacher, align_steps=0.0, cache=str(tmp_path / "cache"), top_k=8)
    with pytest.raises(UserError, match=r"where no cache.json can be read; write it with python"):
        Trainer(at(config, tmp_path / "run")).fit()
    write_cache(config, tmp_path / "cache")
    for wanted, change in (
        ("seed 0, the config says 1", {"seed": 1}),
        ("train.seq_len 32, the config says 16", {"seq_len": 16}),
        (r"distill.top_k 8, the config says 9", {"top_k": 9}),
        (r"distill.temperature 1.0, the config says 2.0", {"temperature": 2.0}),
    ):
        other = copy.deepcopy(config)
        for place in (other, other.train, other.distill):
            for name, value in change.items():
                if hasattr(place, name):
                    setattr(place, name, value)
        with pytest.raises(UserError, match=wanted):
            Trainer(at(other, tmp_path / "run")).fit()
        with pytest.raises(UserError, match=wanted):
            write_cache(other, tmp_path / "cache")


def test_a_teacher_that_does_not_fit(run, teacher, tmp_path):
    with pytest.raises(UserError, match=r"has another tokenizer .* than the data \(ffffffffffff"):
        open_teacher(student(run, teacher), "f" * 64)
    for wanted, config in (
        ("distill.teacher: no checkpoint at nowhere", student(run, "nowhere")),
        (
            r"aligns blocks one by one, but the model has blocks 3 and the teacher .* 2; expected",
            settings(run, "gdn attn gdn", teacher=str(teacher)),
        ),
        ("freeze has 'blocks.9', which matches no", student(run, teacher, freeze=["blocks.9"])),
        ("leave the model nothing to learn", student(run, teacher, freeze=["*"])),
    ):
        with pytest.raises(UserError, match=wanted):
            Trainer(at(config, tmp_path / "run")).fit()


def test_the_plan_counts_the_teacher(run, teacher, tmp_path):
    config = student(run, teacher, align_steps=0.0)
    alone = settings(run)
    state = read_state(find_checkpoint(teacher))
    its = count_model(state.model_config, state.vocab_size, config.train.seq_len)
    hardware = load_hardware("h100")
    planners = [Planner(c, state.vocab_size, hardware) for c in (config, alone)]
    mine, without = (
        p.estimate(c.parallel, 1) for p, c in zip(planners, (config, alone), strict=True)
    )
    assert mine.memory["teacher"] == 4 * its.parameters
    assert "teacher" not in without.memory
    tokens = config.train.global_batch_tokens
    assert mine.model_flops - without.model_flops == its.flops_per_token * tokens
    assert mine.hardware_flops - without.hardware_flops == pytest.approx(
        its.flops_per_token * tokens, rel=0.1
    )
    config.train.freeze = ["embedding"]  # of the student: the teacher has nothing that learns
    its_planner = Planner(config, state.vocab_size, hardware).teacher
    assert its_planner is not None and its_planner.config.frozen == []
    cached = at(config, tmp_path, cache="cache")
    assert (
        "teacher"
        not in Planner(cached, state.vocab_size, hardware).estimate(config.parallel, 1).memory
    )


@pytest.mark.slow
def test_a_teacher_from_hugging_face(run, teacher, tmp_path):
    exported = tmp_path / "exported"
    done = processes.run("pretrain", "export", teacher, exported)
    assert done.returncode == 0, done.stderr
    for name, source in (("ours", str(teacher)), ("theirs", f"hf:{exported}")):
        config = student(run, source, align_steps=0.0)
        assert Trainer(at(config, tmp_path / name)).fit().status == "completed"
    for mine, other in zip(rows(tmp_path / "theirs"), rows(tmp_path / "ours"), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    assert find_checkpoint(tmp_path / "theirs/teacher").exists()
    with pytest.raises(UserError, match=r"distill.teacher: .*nothing-there"):
        Trainer(at(student(run, "hf:./nothing-there"), tmp_path / "other")).fit()


def test_averages_of_weights_where_some_are_frozen(run, tmp_path):
    config = settings(run)
    config.train.freeze, config.optimizer.ema_decay = ["embedding"], 0.9
    config.directory, config.train.steps = str(tmp_path / "frozen"), 2
    assert Trainer(config).fit().status == "completed"
    loaded = [load_model(tmp_path / "frozen", averaged=averaged) for averaged in (False, True)]
    last, average = (dict(found.model.named_parameters()) for found in loaded)
    equal = {name for name in last if last[name].equal(average[name])}
    assert equal == {"embedding.weight"}


def test_resuming_asks_for_the_same_parameters_to_learn(run, teacher, tmp_path):
    config = at(student(run, teacher), tmp_path / "run")
    assert Trainer(config, callbacks=[StopAt(3)]).fit().status == "stopped"
    frozen = at(config, tmp_path / "run", freeze=["embedding"])
    with pytest.raises(UserError, match=r"distill.freeze \[\], the config says \['embedding'\]"):
        Trainer(frozen).fit()
    with pytest.raises(UserError, match=r"align_steps, in steps so far, 3, the config says 2"):
        Trainer(at(config, tmp_path / "run", align_steps=0.3)).fit()


def phase(**distill):
    return PhaseConfig(until=0.5, distill=PhaseDistill(**distill))


@pytest.mark.parametrize(
    ("wanted", "distill", "changes"),
    [
        (r"phases\[0\].distill is set, but distill is null", None, {"phases": True}),
        ("train.segment_tokens is 16, expected null", {}, {"segment_tokens": 16}),
        ("train.carry_state is True, expected false", {}, {"carry_state": True}),
        ("distill.align_steps is 0.25 with a distill.cache", {"cache": "x"}, {}),
        ("policy is rollback with a distill.cache", {"cache": "x", "align_steps": 0.0}, "rollback"),
    ],
)
def test_settings_that_do_not_go_together(run, wanted, distill, changes):
    config = settings(run)
    config.distill = None if distill is None else DistillConfig("runs/teacher", **distill)
    if changes == "rollback":
        config.train.spikes.policy, config.train.spikes.rollback_steps = "rollback", 1
        changes = {}
    if changes.pop("phases", None):
        config.phases = [phase(align=True), PhaseConfig()]
    config.train = dataclasses.replace(config.train, **changes)
    with pytest.raises(ConfigError, match=wanted):
        Trainer(config)


def test_alignment_comes_first(run):
    config = settings(run, teacher="runs/teacher")
    config.phases = [phase(), PhaseConfig(distill=PhaseDistill(align=True))]
    with pytest.raises(ConfigError, match=r"phases\[1\].distill.align is true after a phase that"):
        Trainer(config)


def test_the_command_says_what_it_wrote(run, teacher, tmp_path, capsys):
    overrides = [f"distill.teacher={teacher}", "distill.align_steps=0", "train.steps=2"]
    with pytest.raises(UserError, match=r"distill.cache is null, expected the folder to write"):
        main([str(run.config), *overrides])
    overrides += [f"distill.cache={tmp_path / 'cache'}", "distill.top_k=4"]
    assert main([str(run.config), *overrides]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cache'}: wrote 2 of 2 steps\n"
