"""The first session on a GPU: rehearsed in miniature, and what it does about stages that fail."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import train_gpu
from benchmarks.first_contact import against_loop, against_published, targets, training_steps

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/first_contact.sh"
TEN_MINUTES = (
    *("setup", "parity", "ops", "transformer", "m2rnn", "gdn", "tiles", "other_ops", "fla"),
    *("published", "counters", "small", "profile"),
)
# Sleeps where a model is trained, fails where ops are timed; no other module is run in earnest.
INTERPRETER = """#!/bin/sh
case "$*" in
*"first_contact targets"*) exec {python} "$@" ;;
*ops_gpu*) echo "out of luck"; exit 3 ;;
*train_gpu*) echo $$ >"{folder}/sleeper"; sleep 600 ;;
*) echo "stood in for $*" ;;
esac
"""


def environment(folder, **variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FIRST_CONTACT")}
    return {**kept, "TMPDIR": str(folder), "PYTHON": sys.executable, **variables}


def run(folder, *arguments, **variables):
    return subprocess.run(
        [SCRIPT, *arguments, "--out", folder / "out"],
        env=environment(folder, **variables),
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
    )


def stood_in(folder):
    path = folder / "interpreter"
    path.write_text(INTERPRETER.format(python=sys.executable, folder=folder))
    path.chmod(0o755)
    return str(path)


def rows(folder):
    """(stage, limit, exit status, note) of the summary."""
    text = (folder / "out/summary.txt").read_text().split("\n\n")[0]
    found = re.findall(r"^(\w+) +(\d+) +[\d.]+ +(\d+)(.*)$", text, re.MULTILINE)
    return [(name, int(limit), int(status), note.strip()) for name, limit, status, note in found]


@pytest.mark.slow
def test_every_stage_in_miniature(tmp_path):
    done = run(tmp_path, "--smoke")
    log = (tmp_path / "out/log.txt").read_text()
    assert done.returncode == 0, log
    assert [(name, status) for name, _, status, _ in rows(tmp_path)] == [
        (name, 0) for name in TEN_MINUTES
    ]
    # What fails within a stage is a sentence; only fla's kernels need what a CPU has not.
    failed = re.findall(r"^(.*?) +not available", log, re.MULTILINE)
    theirs = ("delta_rule", "linear_attention (", "dplr", "gdn2", "comba")
    assert all(name.startswith(theirs) for name in failed)
    assert [step.size for step in training_steps(log)] == ["tiny"] * 5
    assert len(against_published(log)) == 1
    assert {cell for cell, _, _ in against_loop(log)} == {"para_gru"}
    assert list((tmp_path / "out").glob("step-*.png"))
    assert not list(tmp_path.glob("first-contact-*/outputs.*"))


def test_a_stage_that_fails_or_passes_its_limit_does_not_stop_the_next(tmp_path):
    done = run(
        tmp_path,
        PYTHON=stood_in(tmp_path),
        FIRST_CONTACT_ONLY="fla published m2rnn",
        FIRST_CONTACT_LIMIT="4",
    )
    assert done.returncode == 1
    assert rows(tmp_path) == [
        ("setup", 4, 0, ""),
        ("m2rnn", 4, 124, "over its limit"),
        ("fla", 4, 0, ""),
        ("published", 4, 3, ""),
    ]
    log = (tmp_path / "out/log.txt").read_text()
    assert "at most 16 s" in log and "out of luck" in log
    assert "stood in for -m pytest" in log and "M2RNN / published kernel's traffic" in log
    assert log.splitlines() == done.stdout.splitlines()
    until_gone(int((tmp_path / "sleeper").read_text()))


def test_counters_are_read_where_there_is_a_profiler(tmp_path):
    profiler = tmp_path / "bin/ncu"
    profiler.parent.mkdir()
    profiler.write_text('#!/bin/sh\necho "profiling: $*"\n')
    profiler.chmod(0o755)
    path = f"{profiler.parent}:{os.environ['PATH']}"
    done = run(tmp_path, PYTHON=stood_in(tmp_path), FIRST_CONTACT_ONLY="counters", PATH=path)
    assert done.returncode == 0
    assert re.search(r"profiling: --clock-control none .* -m benchmarks.profiled_k", done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_commands_of_the_session_itself_are_understood(tmp_path):
    """Without a GPU, and not in miniature, they say that there is none."""
    stages = [name for name in TEN_MINUTES if name not in ("setup", "parity", "fla", "counters")]
    stages += ["one_m2rnn", "long"]
    run(tmp_path, FIRST_CONTACT_ONLY=" ".join(stages), FIRST_CONTACT_LIMIT="600")
    assert [row[::2] for row in rows(tmp_path)] == [("setup", 0), *((name, 1) for name in stages)]
    log = (tmp_path / "out/log.txt").read_text()
    assert log.count("there is no GPU here") == len(stages)


def test_when_stopped_the_stage_at_hand_ends_too(tmp_path):
    variables = environment(
        tmp_path, PYTHON=stood_in(tmp_path), FIRST_CONTACT_ONLY="m2rnn", FIRST_CONTACT_LIMIT="500"
    )
    arguments = [str(SCRIPT), "--out", str(tmp_path / "out")]
    with subprocess.Popen(arguments, env=variables, stdout=subprocess.DEVNULL) as session:
        sleeper = tmp_path / "sleeper"
        while not sleeper.exists() or not sleeper.read_text():
            assert session.poll() is None
            time.sleep(0.05)
        session.send_signal(signal.SIGTERM)
        assert session.wait() == 130
    until_gone(int(sleeper.read_text()))
    assert (tmp_path / "out/log.txt").read_text().endswith("interrupted\n")


def until_gone(process):
    for _ in range(600):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the stage's process still runs")


@pytest.mark.parametrize(
    ("arguments", "only", "message"),
    [
        (["--fast"], "", "'--fast' is unknown, expected --smoke, --wheels FOLDER or --out FOLDER"),
        (["--wheels", "nowhere"], "", "--wheels is 'nowhere', expected a folder"),
        ([], "tea", "FIRST_CONTACT_ONLY names 'tea', expected some of setup parity"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, arguments, only, message):
    done = run(tmp_path, *arguments, FIRST_CONTACT_ONLY=only, PYTHON=stood_in(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


TRAINED = """\
$ python -m benchmarks.train_gpu --sizes 1b{tokens}
size  model                       T  tokens/s    MFU  peak GB  waits  ratio
1b    transformer              4096    50,000  46.0%     61.0      2   1.00
1b    gdn-hybrid-3to1          4096    {speed}  40.0%     61.0      2   0.96
1b    gdn-hybrid-7to1          4096 OutOfMemoryError: CUDA out of memory
410m  transformer             16384   100,000  30.0%     31.0      2   1.00
"""
TIMED = """\
m2rnn, backend                    T   B   both ms   peak MB
triton                         1024  32     4.000       100
stand-in, full history         1024  32    10.000       900
                                  ratio      2.50      9.00
triton                         4096   8     4.000       100
stand-in, full history         4096   8     6.400       900
                                  ratio      1.60      9.00

cell           D   B      T    loop ms kernel          ms    ratio  floor ms  kernel / floor
para_gru    1024   8    512      200.0 shooting     1.000     200x     0.024             4.1
para_gru    1024   8   4096     1600.0 shooting     2.000     800x     0.188            10.6
"""


def test_what_was_measured_is_set_against_the_targets(tmp_path):
    (tmp_path / "gdn.txt").write_text(TRAINED.format(tokens=" --tokens 8192", speed="48,000"))
    (tmp_path / "ops.txt").write_text(TIMED)
    assert list(targets(tmp_path)) == [
        "transformer 1B, T = 4096, tokens/s: 50,000, target 45,000: reached",
        "transformer 1B, T = 4096, MFU: 46.0%, target 45.0%: reached",
        "Gated DeltaNet hybrid 3:1 1B / transformer, T = 4096: 0.960, target 0.950: reached",
        "Gated DeltaNet hybrid 3:1 1B / transformer, T = 16384: not measured, target 1.000",
        "hybrid with one M2RNN layer 1B / without, T = 4096: not measured, target 0.950",
        "M2RNN / published kernel's traffic, forward and backward, slowest at T = 4096: "
        "1.60, target 2.00: not reached",
        "ParaGRU / sequential loop, best at T = 4096: 800, target 700: reached",
        "ParaLSTM / sequential loop: not measured, target 700",
    ]


def test_speeds_are_compared_at_as_many_tokens(tmp_path):
    alone, without = (TRAINED.replace(f"1b    {name}", "3b    x") for name in ("gdn", "trans"))
    (tmp_path / "gdn.txt").write_text(without.format(tokens=" --tokens 8192", speed="48,000"))
    (tmp_path / "transformer.txt").write_text(alone.format(tokens="", speed="1"))
    compared = next(line for line in targets(tmp_path) if "3:1" in line)
    assert "not measured" in compared


@pytest.mark.parametrize(("length", "tokens"), [(4096, 8192), (4096, 32768), (16384, 16384)])
def test_every_model_of_the_benchmark_is_a_run_that_is_accepted(length, tokens, monkeypatch):
    monkeypatch.chdir(ROOT)
    for size in ("410m", "1b"):
        for model in train_gpu.MODELS:
            config = train_gpu.loaded(
                Path(f"configs/models/{size}/{model}.yaml"), length, tokens, "bf16"
            )
            assert config.parallel.micro_batch_size * length == tokens
