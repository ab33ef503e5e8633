"""``python -m pretrain`` as real processes: killed, stopped, resumed, and given bad input."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time

import pytest

from tests.helpers import processes
from tests.helpers.training_run import STEPS, Run, whole_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(folder, corpus):
    run = Run(folder, corpus, "uninterrupted")
    status, output = run.finish_interpreter()
    assert status == 0, output
    return run, output


def test_a_whole_run_leaves_what_a_user_expects(uninterrupted):
    run, output = uninterrupted
    assert [row["step"] for row in run.metrics if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in run.metrics if "valid_loss" in row] == [5, 10, 15, 16]
    losses = [row["loss"] for row in run.metrics if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    for name in (
        "config.yaml",
        "environment.json",
        "model.json",
        "log.txt",
        "plots/loss.png",
        "checkpoints/latest",
        "checkpoints/step-00000016/files.json",
    ):
        assert (run.directory / name).stat().st_size > 0, name
    for part in ("parameters", "a sample of what it writes", "python -m evals", "step 16/16"):
        assert part in output
    assert "Warning" not in output
    status, output = run.finish()
    assert (status, "no step left to do: all 16 are done" in output) == (0, True)


def test_killed_at_any_moment_it_goes_on_bit_for_bit(uninterrupted, folder, corpus):
    """kill -9 after random steps and, twice, while a checkpoint is being written."""
    expected, _ = uninterrupted
    run = Run(folder, corpus, "killed")
    checkpoints, chance = run.directory / "checkpoints", random.Random(0)

    def steps_done(count):
        return lambda: sum("loss" in row for row in whole_lines(run)) >= count

    def saving(step):
        return lambda: any(
            list(p.iterdir()) for p in checkpoints.glob(f".writing-step-{step:08d}*")
        )

    for moment in (
        steps_done(1),
        steps_done(chance.randint(4, 6)),
        saving(6),
        steps_done(chance.randint(8, 9)),
        saving(12),
        steps_done(chance.randint(13, 14)),
    ):
        process = run.start()
        run.wait_until(process, moment)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
        if (checkpoints / "latest").exists():
            assert (checkpoints / (checkpoints / "latest").read_text() / "files.json").exists()
    status, output = run.finish()
    assert status == 0, output
    assert "resumed from" in output
    assert run.losses == expected.losses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_saves_and_exits_with_its_own_status(uninterrupted, folder, corpus, number):
    expected, _ = uninterrupted
    run = Run(folder, corpus, f"signal-{number.name}")
    process = run.start()
    run.wait_until(process, lambda: len(whole_lines(run)) >= 4)
    for _ in range(3):  # launchers pass on what the process has received already
        process.send_signal(number)
        time.sleep(0.02)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert f"stopped by {number.name}" in output
    stopped = run.metrics[-1]["step"]
    assert (run.directory / f"checkpoints/step-{stopped:08d}/files.json").exists()
    if number == signal.SIGUSR2:
        assert run.finish()[0] == 0
        assert run.losses == expected.losses


def test_bad_input_is_one_sentence_and_status_2(uninterrupted, folder, corpus, tmp_path):
    run, _ = uninterrupted
    before = sorted(p.relative_to(run.directory) for p in run.directory.rglob("*"))
    other_data = tmp_path / "data"
    shutil.copytree(corpus, other_data)
    manifest = json.loads((other_data / "manifest.json").read_text())
    model = other_data / manifest["tokenizer"]["file"]
    for overrides, message in (
        (["optimizer.lrr=1"], "unknown setting 'optimizer.lrr' (did you mean 'lr'?)"),
        (["model.hidden_size=48"], "holds another model: model.hidden_size is 24 there and 48"),
        (["train.seq_len=16"], "was trained with train.seq_len 32, the config says 16"),
        ([f"data.path={tmp_path}/nothing"], "holds no manifest.json: run python -m data_prep"),
        (["checkpoint.resume=step-00000099"], "no checkpoint at"),
        (["model.vocab_size=10"], "model.vocab_size is 10, fewer than the 300 ids"),
    ):
        status, output = run.finish(*overrides)
        assert status == 2, output
        (line,) = [x for x in output.splitlines() if x.strip()]
        assert line.startswith("error: ")
        assert message in line
    changed = manifest | {"content_sha256": "0" * 64}
    (other_data / "manifest.json").write_text(json.dumps(changed))
    status, output = run.finish(f"data.path={other_data}")
    assert status == 2
    assert "was trained with data code@" in output
    assert "the config says code@0000000000000000" in output
    model.write_bytes(model.read_bytes() + b"\0")
    status, output = run.finish(f"data.path={other_data}")
    assert status == 2
    assert output.count("\n") == 1
    assert sorted(p.relative_to(run.directory) for p in run.directory.rglob("*")) == before


@pytest.mark.slow
def test_one_run_directory_has_one_run(folder, corpus):
    run = Run(folder, corpus, "twice")
    first = run.start("train.steps=2000", "checkpoint.every=2000")
    run.wait_until(first, lambda: len(whole_lines(run)) >= 1)
    status, output = run.finish()
    first.kill()
    first.communicate()
    assert status == 2
    assert "another process is training in" in output


def test_a_damaged_checkpoint_is_refused_and_the_one_before_used_on_request(
    uninterrupted, folder, corpus
):
    expected, _ = uninterrupted
    run = Run(folder, corpus, "damaged")
    shutil.copytree(expected.directory, run.directory)
    newest = run.directory / "checkpoints" / "step-00000016"
    victim = next(newest.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    status, output = run.finish()
    assert status == 2
    assert "step-00000016 is damaged" in output
    assert "checkpoint.resume=step-00000015" in output
    status, output = run.finish("checkpoint.resume=step-00000015")
    assert status == 0, output
    assert run.losses == expected.losses
    status, output = run.finish("checkpoint.resume=step-00000015")
    assert (status, "no step left to do" in output) == (0, True)  # not from there once more


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_or_is_skipped(folder, corpus):
    huge = ["optimizer.lr=1e30", "optimizer.clip_grad=0", "schedule.warmup_steps=0"]
    run = Run(folder, corpus, "stops")
    status, output = run.finish(*huge)
    assert status == 3, output
    assert "not finite, stopped without updating" in output
    run = Run(folder, corpus, "skips")
    status, output = run.finish(*huge, "train.nonfinite=skip", "sample.tokens=0")
    assert status == 0, output
    assert run.metrics[-2]["skipped"] > 1


@pytest.mark.slow
def test_a_recursive_model_from_a_trained_one(folder, corpus):
    """Dense run, then a loop made from its blocks, scored with more passes than it was told."""
    dense = Run(folder, corpus, "dense", steps=4)
    assert dense.finish("model.pattern=gdn 4*attn gdn")[0] == 0
    looped = Run(folder, corpus, "looped", steps=4)
    settings = [
        "model.pattern=gdn 2*attn gdn",
        "model.recursion.prelude=1",
        "model.recursion.coda=1",
        "model.recursion.times=2",
        "initialize.method=average",
        f"initialize.checkpoint={dense.directory}",
        "schedule.warmup_steps=4",
    ]
    status, output = looped.finish(*settings)
    assert status == 0, output
    fresh = Run(folder, corpus, "fresh", steps=4)
    assert fresh.finish(*[s for s in settings if not s.startswith("initialize")])[0] == 0
    first = {run.directory.name: run.metrics[0] for run in (looped, fresh)}
    assert first["looped"]["recurrences"] == 2
    assert first["looped"]["loss"] < first["fresh"]["loss"] - 0.3
    for run, recurrences, expected in ((looped, 4, 0), (dense, 2, 1)):
        words = ("--recurrences", recurrences, "--max-tokens", 64)
        done = processes.run("evals", run.directory, *words)
        assert (done.returncode != 0) == expected, done.stderr
        if expected:
            assert "has no loop" in done.stderr
        else:
            (path,) = (run.directory / "evals").glob("*recurrences-4*.json")
            assert json.loads(path.read_text())["recurrences"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [("parallel.tensor=2", "parallel.sequence=true"), ("parallel.context=2",)]
)
def test_verify_compares_a_layout_with_one_process(folder, corpus, layout):
    run = Run(folder, corpus, "verified")
    words = (*layout, "--processes", 2, "--steps", 2)
    done = processes.run("pretrain", "verify", run.config, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal ") >= 2
    assert "DIFFERENT" not in done.stdout
    assert not run.directory.exists()  # nothing outside its temporary folder
    command = ("pretrain", "verify", run.config, "parallel.tensor=2")
    bad = processes.run(*command, "--processes", 3)
    assert bad.returncode == 2
    assert "is 2 x 1 = 2, but there are 3 processes" in bad.stderr
    assert "Traceback" not in bad.stderr
