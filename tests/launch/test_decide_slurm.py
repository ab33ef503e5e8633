"""``python -m launch decide --cluster`` on a real Slurm: a job for each round."""

from __future__ import annotations

import json
import sys

import pytest

from evals.scaling.decide.record import VERDICT
from launch.__main__ import main
from launch.decisions.checking import check
from pretrain.common.errors import EXIT_STOPPED
from tests.helpers.decisions import CONFIG, changed
from tests.helpers.slurm_cluster import SlurmCluster, missing

CLUSTER = """
nodes: 1
cpus_per_node: 1
time: "30:00"
python: {python}
environment: {{OMP_NUM_THREADS: "1"}}
"""


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    reason = missing()
    if reason:
        pytest.skip(reason)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"), port=17340)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    yield cluster
    cluster.stop()


@pytest.mark.slow
def test_each_round_is_a_job_and_the_same_command_goes_on(slurm, tmp_path, corpus, capsys):
    path, cluster = tmp_path / "decide.yaml", tmp_path / "cluster.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, data=corpus))
    changed(
        path,
        ("{model.hidden_size: 24}, {model.hidden_size: 48}]", "{model.hidden_size: 48}]"),
        ("seeds: 2", "seeds: 1"),
    )
    cluster.write_text(CLUSTER.format(python=sys.executable))
    words = ["decide", str(path), f"--cluster={cluster}"]
    for number in (1, 2):
        assert main(words) == EXIT_STOPPED
        assert "with 2 runs; the same command goes on after them" in capsys.readouterr().out
        assert main(words) == EXIT_STOPPED  # too early: nothing is submitted twice
        assert "submitted" not in capsys.readouterr().out
        slurm.wait_for(lambda: not slurm.command("squeue", "-h"), 400)
        assert len(list((tmp_path / "runs").glob("*-seed0"))) == 2 * number
    assert main(words) == 0
    said = json.loads((tmp_path / "runs" / VERDICT).read_text())
    assert said["reason"] == "all made"
    assert "are what their runs give" in check(tmp_path / "runs")
