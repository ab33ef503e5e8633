"""Of several processes that refuse one speaks, and the others and torchrun's report are quiet."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.parallel.torchrun import report
from tests.helpers.processes import ENVIRONMENT, TORCHRUN, run, run_interpreter

TERM = -int(signal.SIGTERM)
REFUSING = ["-m", "pretrain", "nowhere.yaml"]
SENTENCE = "error: no config file at nowhere.yaml"


def failures(*codes: int) -> dict[int, SimpleNamespace]:
    return {rank: SimpleNamespace(exitcode=c, timestamp=9 - rank) for rank, c in enumerate(codes)}


@given(
    st.permutations(range(6)),
    st.sampled_from([1, 2, 3, 75]),
    st.integers(0, 5),
)
def test_the_status_is_that_of_the_first_that_ended_by_itself(order, code, ended_by_torchrun):
    codes = [code, *[TERM] * ended_by_torchrun, *[code] * (5 - ended_by_torchrun)]
    assert report(failures(*(codes[i] for i in order))) == code


def test_a_killed_process_is_named(capsys):
    assert report(failures(TERM, -9, TERM)) == 128 + 9
    assert "error: process 1 was ended by SIGKILL, as the system" in capsys.readouterr().err
    assert report(failures(-11, TERM)) == 128 + 11
    assert "process 0 was ended by SIGSEGV\n" in capsys.readouterr().err
    assert report(failures(TERM, TERM)) == 128 + 15


def test_of_one_command_the_sentence_is_all():
    done = run("pretrain", "nowhere.yaml")
    assert (done.returncode, done.stdout, done.stderr.strip()) == (2, "", SENTENCE)


def test_a_command_line_without_a_config_is_refused_in_a_sentence_too():
    done = run("pretrain")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the following arguments are required: config")
    assert done.stderr.count("\n") == 1


def test_the_first_to_refuse_speaks_and_the_others_do_not(tmp_path):
    spoken = []
    for rank in (1, 0, 2):
        report_file = tmp_path / "attempt_0" / str(rank) / "error.json"
        report_file.parent.mkdir(parents=True)
        environment = {**ENVIRONMENT, "TORCHELASTIC_ERROR_FILE": str(report_file)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3"}
        done = run("pretrain", "nowhere.yaml", environment=environment)
        assert done.returncode == 2
        assert SENTENCE in report_file.read_text()
        spoken.append(done.stderr.strip())
    assert spoken == [SENTENCE, "", ""]


@pytest.mark.slow
def test_started_by_us_it_is_one_sentence_and_status_2():
    ours = ["-m", "pretrain.parallel.torchrun", "--standalone", "--nproc-per-node", "2"]
    status, output = run_interpreter(*ours, *REFUSING)
    assert (status, output.strip()) == (2, SENTENCE)


@pytest.mark.slow
def test_started_by_torchrun_it_is_said_once_before_its_report_and_at_its_end():
    status, output = run_interpreter(*TORCHRUN[1:], "2", *REFUSING)
    lines = output.strip().splitlines()
    assert status == 1
    assert lines.count(SENTENCE) == 1
    assert lines[-2].endswith(f"traceback : {SENTENCE}")


@pytest.mark.slow
def test_started_by_us_a_killed_process_is_named(tmp_path):
    script = tmp_path / "script.py"
    kill = "os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)"
    script.write_text(f"import os, time\n{kill}\ntime.sleep(60)\n")
    ours = ["-m", "pretrain.parallel.torchrun", "--standalone", "--nproc-per-node", "2"]
    status, output = run_interpreter(*ours, script)
    assert status == 128 + 9
    assert output.startswith("error: process 1 was ended by SIGKILL")
