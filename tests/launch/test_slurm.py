"""``python -m launch --cluster`` on a real Slurm of two nodes, which this starts where it can."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest

from launch.__main__ import main
from launch.cluster import load_cluster
from launch.cluster_checks import time_limit_seconds
from launch.expansion import load_grid
from launch.slurm import render
from pretrain.common.config_loader import ConfigError
from pretrain.common.errors import UserError
from tests.helpers.processes import ROOT
from tests.helpers.slurm_cluster import SlurmCluster, missing

CONFIG = """
name: run
directory: {folder}/run
model:
  hidden_size: 16
  pattern: gdn
  mixers: {{gdn: {{num_heads: 2, head_dim: 4}}}}
data: {{path: {data}}}
schedule: {{kind: constant, warmup_steps: 1}}
train: {{steps: {steps}, seq_len: 32, global_batch_tokens: 64}}
parallel: {{tensor: 2, micro_batch_size: 2}}
validation: {{every: 0, tokens: 32}}
checkpoint: {{every: 1000}}
logging: {{every: 1}}
sample: {{tokens: 0}}
"""
CLUSTER = """
nodes: {nodes}
cpus_per_node: 1
time: "{time}"
signal_seconds: {signal_seconds}
python: {python}
environment: {{OMP_NUM_THREADS: "1"}}
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(reason)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
    yield cluster
    cluster.stop()
    del os.environ["SLURM_CONF"]


class Job:
    """A config, a cluster's file, and what became of them."""

    def __init__(
        self,
        folder,
        corpus,
        *,
        steps=6,
        grid="",
        nodes=2,
        time="30:00",
        signal_seconds=5,
        **changes,
    ):
        folder.mkdir(exist_ok=True)
        self.config, self.cluster = folder / "run.yaml", folder / "cluster.yaml"
        text = CONFIG.format(folder=folder, data=corpus, steps=steps) + grid
        for old, new in changes.items():
            text = text.replace(old, new)
        self.config.write_text(text)
        self.cluster.write_text(
            CLUSTER.format(
                nodes=nodes, time=time, signal_seconds=signal_seconds, python=sys.executable
            )
        )
        self.directory = folder / "run"

    def launch(self, *arguments):
        return main([str(self.config), f"--cluster={self.cluster}", *map(str, arguments)])

    @property
    def id(self):
        found = sorted(self.directory.glob("**/launch.json"))  # its own, or its members'
        return json.loads(found[0].read_text())["job"].split("_")[0]

    def steps(self, directory=None):
        path = (directory or self.directory) / "metrics.jsonl"
        if not path.exists():
            return []
        rows = [json.loads(x) for x in path.read_text().splitlines(True) if x.endswith("\n")]
        return [(r["step"], r["loss"], r["grad_norm"]) for r in rows if "loss" in r]

    def output(self, directory=None):
        path = (directory or self.directory) / "output.txt"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def uninterrupted(slurm, tmp_path_factory, corpus):
    """A 2-node TP2 job over gloo, run to its end."""
    job = Job(tmp_path_factory.mktemp("whole") / "job", corpus, steps=40)
    assert job.launch() == 0
    slurm.wait_for(lambda: "COMPLETED" in slurm.job_state(job.id), 400)
    return job


@pytest.mark.slow
def test_two_nodes_to_the_end(uninterrupted, capsys):
    job = uninterrupted
    assert [s for s, *_ in job.steps()] == list(range(1, 41))
    assert "2 processes (2 tensor-parallel)" in job.output()
    assert "on n[1-2], start 0" in job.output()
    assert main(["status", str(job.config)]) == 0
    assert "1 done" in capsys.readouterr().out
    assert job.launch() == 0
    assert "nothing to start" in capsys.readouterr().out
    assert main(["logs", str(job.directory)]) == 0
    assert "step 40/40" in capsys.readouterr().out


@pytest.mark.slow
def test_the_signal_saves_and_the_job_goes_on_bit_for_bit(slurm, uninterrupted, tmp_path, corpus):
    job = Job(tmp_path / "job", corpus, steps=40)
    job.launch()
    slurm.wait_for(lambda: len(job.steps()) >= 5, 300)
    # As Slurm does before the time limit: to the batch script alone.
    slurm.command("scancel", "--batch", "--signal=USR2", job.id)
    slurm.wait_for(lambda: "== queued again" in job.output(), 200)
    stopped = len(job.steps())
    assert stopped < 40
    assert "stopped by SIGUSR2" in job.output()
    slurm.wait_for(lambda: "COMPLETED" in slurm.job_state(job.id), 400)
    assert "start 1" in job.output()
    assert f"resumed from {job.directory}/checkpoints/step-{stopped:08d}" in job.output()
    assert job.steps() == uninterrupted.steps()


@pytest.mark.slow
def test_a_preempted_job_saves_and_goes_on_bit_for_bit(slurm, uninterrupted, tmp_path, corpus):
    job = Job(tmp_path / "job", corpus, steps=40)
    job.launch()
    slurm.wait_for(lambda: len(job.steps()) >= 5, 300)
    urgent = subprocess.run(
        ["srun", "--partition=urgent", "--nodes=2", "--ntasks=2", "--cpus-per-task=2", "true"],
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert urgent.returncode == 0, urgent.stderr
    stopped = len(job.steps())
    assert 5 <= stopped < 40
    slurm.wait_for(lambda: "COMPLETED" in slurm.job_state(job.id), 600)
    assert "start 1" in job.output()
    assert f"resumed from {job.directory}/checkpoints/step-{stopped:08d}" in job.output()
    assert job.steps() == uninterrupted.steps()


@pytest.mark.slow
def test_a_time_limit_is_chained_until_the_budget_is_done(slurm, tmp_path, corpus):
    """A limit of a minute, the signal after 20 seconds, and steps that take 30 at least."""
    job = Job(
        tmp_path / "job",
        corpus,
        steps=600,
        time="1:00",
        signal_seconds=40,
        nodes=1,
        grid="\ncallbacks: [tests.helpers.slow_steps.SlowSteps]\n",
        **{"tensor: 2": "tensor: 1"},
    )
    job.launch()
    slurm.wait_for(lambda: "COMPLETED" in slurm.job_state(job.id), 1200)
    assert "start 1" in job.output()
    assert "stopped by SIGUSR2" in job.output()
    assert [s for s, *_ in job.steps()] == list(range(1, 601))


@pytest.mark.slow
def test_cancel_saves_and_does_not_queue_again(slurm, tmp_path, corpus, capsys):
    job = Job(tmp_path / "job", corpus, steps=100000)
    job.launch()
    slurm.wait_for(lambda: len(job.steps()) >= 3, 300)
    assert main(["status", str(job.config)]) == 0
    assert "1 running" in capsys.readouterr().out
    assert main(["cancel", str(job.config)]) == 0
    assert "asked to save and exit" in capsys.readouterr().out
    slurm.wait_for(lambda: "CANCELLED" in slurm.job_state(job.id), 200)
    assert (job.directory / "checkpoints/latest").exists()
    assert "== queued again" not in job.output()
    main(["status", str(job.config)])
    assert "1 stopped" in capsys.readouterr().out


@pytest.mark.slow
def test_a_node_that_dies_costs_the_steps_since_the_last_save(slurm, tmp_path, corpus):
    job = Job(tmp_path / "job", corpus, steps=60, **{"every: 1000": "every: 5"})
    job.launch()
    slurm.wait_for(lambda: len(job.steps()) >= 12, 300)
    slurm.kill_node("n2")
    try:
        slurm.wait_for(lambda: "RUNNING" not in slurm.job_state(job.id), 300)
    finally:
        slurm.start_node("n2")
    slurm.wait_for(lambda: "COMPLETED" in slurm.job_state(job.id), 600)
    assert [s for s, *_ in job.steps()] == list(range(1, 61))
    assert "resumed from" in job.output()


@pytest.mark.slow
def test_an_array_with_a_throttle(slurm, tmp_path, corpus, capsys):
    job = Job(
        tmp_path / "job",
        corpus,
        grid="grid: {seed: [0, 1, 2, 3]}\n",
        nodes=1,
        **{"tensor: 2": "tensor: 1"},
    )
    job.launch("--at-once", 2)
    assert "--array=0-3%2" in (job.directory / "job.sh").read_text()
    number = json.loads((job.directory / "seed=2/launch.json").read_text())["job"].split("_")[0]
    most = 0

    def done():
        nonlocal most
        states = slurm.job_state(number).split()
        most = max(most, states.count("RUNNING"))
        return states.count("COMPLETED") == 4

    slurm.wait_for(done, 600)
    assert most == 2
    capsys.readouterr()
    main(["status", str(job.config)])
    assert "4 done" in capsys.readouterr().out
    losses = {tuple(job.steps(job.directory / f"seed={s}")) for s in range(4)}
    assert len(losses) == 4
    assert all(len(found) == 6 for found in losses)


@pytest.mark.slow
def test_a_member_of_an_array_is_queued_again_alone(slurm, tmp_path, corpus):
    """The last one, whose SLURM_JOB_ID is the whole array's; others are done, or go on."""
    job = Job(
        tmp_path / "job",
        corpus,
        nodes=1,
        grid="\ncallbacks: [tests.helpers.slow_steps.SlowSteps]\n"
        "grid: {train.steps: [3, 400, 401]}\n",
        **{"tensor: 2": "tensor: 1"},
    )
    job.launch()
    done, other, last = (job.directory / f"steps={n}" for n in (3, 400, 401))
    number = json.loads((last / "launch.json").read_text())["job"].split("_")[0]
    slurm.wait_for(lambda: "COMPLETED" in slurm.job_state(f"{number}_0"), 300)
    slurm.wait_for(lambda: len(job.steps(last)) >= 3 and len(job.steps(other)) >= 1, 300)
    slurm.command("scancel", "--batch", "--signal=USR2", f"{number}_2")
    slurm.wait_for(lambda: "== queued again" in job.output(last), 200)
    slurm.wait_for(lambda: slurm.job_state(number).split() == 3 * ["COMPLETED"], 600)
    assert "start 1" in job.output(last)
    assert [step for step, *_ in job.steps(last)] == list(range(1, 402))
    for directory in (done, other):
        assert job.output(directory).count("== job") == 1, "started once"
        assert "signal" not in job.output(directory)


@pytest.mark.slow
def test_the_same_step_failing_again_ends_it_with_the_reason(slurm, tmp_path, corpus, capsys):
    """A loss that is no number fails again on the same nodes and in the queue, at the same step."""
    job = Job(
        tmp_path / "job",
        corpus,
        nodes=1,
        **{"tensor: 2": "tensor: 1", "train:": "optimizer: {lr: 1e30}\ntrain:"},
    )
    job.launch()
    slurm.wait_for(lambda: "== queued again" in job.output(), 200)
    slurm.wait_for(lambda: "failed 3 times after step" in job.output(), 200)
    slurm.wait_for(lambda: "FAILED" in slurm.job_state(job.id), 200)
    again, queued = "== started again on the same nodes", "== queued again"
    marks = [x for x in job.output().splitlines() if x in (again, queued)]
    assert marks == [again, queued]
    assert "start 1" in job.output()
    capsys.readouterr()
    main(["status", str(job.config)])
    shown = capsys.readouterr().out
    assert "1 failed" in shown
    assert "failed 3 times after step" in shown


@pytest.mark.slow
def test_a_run_that_fails_once_goes_on_on_the_same_nodes(slurm, tmp_path, corpus):
    job = Job(
        tmp_path / "job",
        corpus,
        nodes=1,
        grid="\ncallbacks: [tests.helpers.fail_once.FailOnce]\n",
        **{"tensor: 2": "tensor: 1", "every: 1000": "every: 2"},
    )
    job.launch()
    slurm.wait_for(lambda: "COMPLETED" in slurm.job_state(job.id), 300)
    assert "== started again on the same nodes" in job.output()
    assert "resumed from" in job.output()
    assert "start 1" not in job.output() and "== queued again" not in job.output()
    assert [step for step, *_ in job.steps()] == list(range(1, 7))


@pytest.mark.slow
def test_a_bad_config_never_reaches_the_queue(slurm, tmp_path, corpus):
    before = slurm.command("squeue", "-h", "--states=all", "-o", "%i")
    job = Job(tmp_path / "job", corpus, grid="grid: {optimizer.lr: [1e-3, -1]}\n")
    with pytest.raises(ConfigError, match=r"member lr=-1: optimizer.lr is -1"):
        job.launch()
    job = Job(tmp_path / "job", corpus, **{"tensor: 2": "tensor: 4"})
    with pytest.raises(UserError, match=r"parallel\.tensor is 4, which does not divide 2"):
        job.launch()
    job = Job(tmp_path / "job", corpus)
    job.cluster.write_text(job.cluster.read_text() + "partition: nothing\n")
    with pytest.raises(UserError, match=r"sbatch refused .*invalid partition"):
        job.launch()
    assert slurm.command("squeue", "-h", "--states=all", "-o", "%i") == before


BRANCHES = """
grid:
  zip: {{branch.tokens: [128, 256, 64000000], train.steps: [4, 6, 1000001]}}
branch: {{run: {trunk}}}
"""


@pytest.mark.slow
def test_branches_wait_for_a_running_trunk(slurm, tmp_path, corpus, capsys):
    """Two begin while it goes on; it is cancelled before the third one's step."""
    one = {"tensor: 2": "tensor: 1", "every: 1000": "every: 1000000, keep: [128, 256]"}
    trunk = Job(
        tmp_path / "trunk",
        corpus,
        steps=1000000,
        nodes=1,
        grid="\ncallbacks: [tests.helpers.slow_steps.SlowSteps]\n",
        **one,
    )
    trunk.launch()
    branches = Job(
        tmp_path / "branches",
        corpus,
        nodes=1,
        grid=BRANCHES.format(trunk=trunk.directory),
        **{"tensor: 2": "tensor: 1", "kind: constant": "kind: wsd"},
    )
    branches.launch("--at-once", 1)
    assert f"--dependency=after:{trunk.id}" in (branches.directory / "job.sh").read_text()
    capsys.readouterr()
    main(["status", str(branches.config)])
    shown = capsys.readouterr().out
    assert "3 queued" in shown and "waits for step" in shown
    names = [member.name for member in load_grid(branches.config).members]
    early, late, never = (branches.directory / name for name in names)
    for branch in (early, late):  # whichever of them looks first
        slurm.wait_for(lambda found=branch: len(branches.steps(found)) == 2, 600)
    assert [step for step, *_ in branches.steps(early)] == [3, 4]
    assert [step for step, *_ in branches.steps(late)] == [5, 6]
    assert "RUNNING" in slurm.job_state(trunk.id), "they did not wait for its end"
    slurm.wait_for(lambda: "== waits for step 1,000,000 of" in branches.output(never), 200)
    assert "== queued again" in branches.output(never)
    main(["cancel", str(trunk.config)])
    slurm.wait_for(lambda: "and nothing trains it" in branches.output(never), 300)
    slurm.wait_for(lambda: slurm.job_state(branches.id).count("FAILED") == 1, 100)
    capsys.readouterr()
    main(["status", str(branches.config)])
    shown = capsys.readouterr().out
    assert "1 failed" in shown and "2 done" in shown


# Without a Slurm


def test_the_script_is_shell_that_a_person_can_read(tmp_path, corpus):
    job = Job(tmp_path / "a job", corpus, grid="grid: {seed: [0, 1]}\n")
    grid = load_grid(job.config)
    for name in ("slurm-cpu", "slurm-h100-8x", "slurm-h100-8x-apptainer"):
        cluster = load_cluster(ROOT / f"configs/clusters/{name}.yaml")
        script = render(cluster, grid, grid.members, 1)
        path = tmp_path / "job.sh"
        path.write_text(script)
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
        assert "'" + str((tmp_path / "a job/run/seed=0").resolve()) + "'" in script
        assert "#SBATCH --array=0-1%1" in script
        assert f"#SBATCH --signal=B:USR2@{cluster.signal_seconds}" in script
        assert ("--gpus-per-node=8" in script) == ("h100" in name)
    assert "apptainer exec --nv --bind=/shared:/shared /shared/images/pretrain.sif" in script
    assert "module load apptainer" in script
    assert "--force" not in script
    assert "--attempt $attempt --force &" in render(cluster, grid, grid.members, 1, force=True)


def test_a_dry_run_shows_the_plan_and_submits_nothing(tmp_path, corpus, capsys):
    job = Job(tmp_path / "job", corpus, nodes=2)
    hardware = ROOT / "configs/hardware/cpu.yaml"
    job.cluster.write_text(job.cluster.read_text() + f"hardware: {hardware}\n")
    assert job.launch("--dry-run") == 0
    shown = capsys.readouterr().out
    assert "planned on 2 devices" in shown
    assert "#SBATCH --nodes=2" in shown
    assert not job.directory.exists()


def test_what_cannot_fit_is_not_submitted(tmp_path, corpus, capsys, monkeypatch):
    job = Job(tmp_path / "job", corpus, nodes=2)
    hardware = (ROOT / "configs/hardware/cpu.yaml").read_text()
    lines = ["memory_gb: 1e-5" if x.startswith("memory_gb") else x for x in hardware.splitlines()]
    (tmp_path / "small.yaml").write_text("\n".join(lines))
    job.cluster.write_text(job.cluster.read_text() + f"hardware: {tmp_path / 'small.yaml'}\n")
    submitted: list[object] = []

    def submit(*arguments, **options):
        submitted.append(arguments)
        return "1", "x"

    monkeypatch.setattr("launch.slurm.submit", submit)
    with pytest.raises(UserError, match=r"does not fit: .* GB per device; .* --force submits it"):
        job.launch()
    assert not submitted and "planned on 2 devices" in capsys.readouterr().out
    assert job.launch("--force") == 0 and len(submitted) == 1


BAD_TIMES = ("soon", "1d", "2h", "1:2:3:4", "-1", "1:", "1-", "1-2:3:4:5", "", "1.5", "\u0661")
GOOD_TIMES = {
    "10": 600,
    "1440": 86400,
    "10:30": 630,
    "1000:00:00": 3_600_000,
    "1:00:05": 3605,
    "1-0": 86400,
    "1-12": 129_600,
    "1-12:30": 131_400,
    "2-01:02:03": 176_523,
}
BAD_MEMORY = ("lots", "1.5G", "64Gi", "64 G", "-5", "1e3", "64P", "", "G")
GOOD_MEMORY = ("64G", "64GB", "0", "64000", "2T", "64m", "64k", "64mb")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("partion: gpu", r"unknown setting 'partion' \(did you mean 'partition'"),
        *((f"time: '{t}'", f"time is '{t}', expected Slurm's") for t in BAD_TIMES),
        *((f"memory: '{m}'", f"memory is '{m}', expected Slurm's") for m in BAD_MEMORY),
        *(
            (f"{n}: 'a b'", f"{n} is 'a b', expected a name")
            for n in ("partition", "account", "qos")
        ),
        ("partition: ''", "partition is '', expected a name"),
        ("partition: 'a,,b'", "partition is 'a,,b', expected a name"),
        (
            "{time: '10:00', signal_seconds: 600}",
            "signal_seconds is 600, expected less than the 600",
        ),
        ('constraint: "a\\nb"', r"constraint is 'a\\nb', expected text without control characters"),
        ('python: "a\\tb"', r"such as \\t"),
        ('modules: [x, "a\\x1bb"]', r"modules\[1\] is .* such as \\x1b"),
        ('container: {image: "a\\x85b"}', r"container.image is .* such as \\x85"),
        ("environment: {A-B: x}", "environment has 'A-B', expected the name of a variable"),
        ("sbatch_options: ['--gres gpu:8']", "has '--gres gpu:8', expected one option in each"),
        ("srun_options: [mpi=none]", "srun_options has 'mpi=none', expected one option in each"),
        ("sbatch_options: ['-pdebug']", "has '-pdebug', expected the long form"),
        ("sbatch_options: ['--part=debug']", "has '--part=debug': set partition instead"),
        ("sbatch_options: ['--arra=0-3']", "has '--arra=0-3': the script sets it itself"),
        ("sbatch_options: ['--time=1:00']", "has '--time=1:00': set time instead"),
        ("sbatch_options: ['--mem=1G']", "has '--mem=1G': set memory instead"),
        ("sbatch_options: ['--array=0-9']", "has '--array=0-9': the script sets it itself"),
        ("nodes: 0", "nodes is 0, expected at least 1"),
        ("container: {runtime: docker, image: x}", "container.runtime is 'docker'"),
        ("kind: pbs", "kind is 'pbs'"),
    ],
)
def test_bad_clusters_are_named(tmp_path, line, message):
    path = tmp_path / "cluster.yaml"
    path.write_text(line)
    with pytest.raises(ConfigError, match=message):
        load_cluster(path)
    with pytest.raises(ConfigError, match=r"no config file at configs/clusters/nowhere.yaml"):
        load_cluster("nowhere")


def test_what_slurm_accepts_is_accepted(tmp_path):
    """Each was given to sbatch 22.05, and so were the bad ones of above."""
    path = tmp_path / "cluster.yaml"
    for text, seconds in GOOD_TIMES.items():
        path.write_text(f"time: '{text}'\n")
        assert load_cluster(path).time == text
        assert time_limit_seconds(text) == seconds
    for text in GOOD_MEMORY:
        path.write_text(f"memory: '{text}'\n")
        assert load_cluster(path).memory == text
    path.write_text("time: UNLIMITED\npartition: main,long-2\nconstraint: 'a&[b|c*2]'\n")
    assert load_cluster(path).partition == "main,long-2"


@pytest.mark.parametrize("place", ["name", "directory", "grid"])
@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\x1b", "\x7f", "\x85"])
def test_control_characters_reach_no_script(tmp_path, corpus, place, character):
    bad = f"x{character}touch INJECTED #"
    job = Job(tmp_path / "job", corpus, **{"tensor: 2": "tensor: 1"})
    values = json.dumps(bad)
    text = job.config.read_text()
    if place == "grid":
        text += f"grid: {{seed: {{{values}: 0, b: 1}}}}\n"  # a label
        job.config.write_text(text)
        found = load_grid(job.config)
        assert all(character not in member.name for member in found.members)
        return
    old = "name: run" if place == "name" else f"directory: {job.directory}"
    job.config.write_text(text.replace(old, f"{place}: {values}"))
    with pytest.raises(UserError, match=f"{place} is .*control character"):
        job.launch("--dry-run")


def words_of(script):
    """What sbatch reads from the script's directives: backslashes count within single quotes."""
    found = []
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH ").replace("\\\\", "\\"))
            found.append(word)
    return found


@pytest.mark.parametrize(
    "name", ["a b", "a'b", 'a"b', "a;b", "$(touch x)", "`x`", "#", "a\\b", "50%"]
)
def test_names_are_words_of_the_script(tmp_path, corpus, name):
    folder = tmp_path / name.replace("\\", "-")
    job = Job(folder, corpus, nodes=1, **{"tensor: 2": "tensor: 1"})
    text = job.config.read_text().replace("name: run", f"name: {json.dumps(name)}")
    job.config.write_text(
        text.replace(f"directory: {job.directory}", f"directory: {json.dumps(str(job.directory))}")
    )
    job.cluster.write_text(
        job.cluster.read_text()
        + f"sbatch_options: [{json.dumps('--comment=' + name)}]\n"
        + f"srun_options: [{json.dumps('--label=' + name)}]\nmodules: [{json.dumps(name)}]\n"
    )
    grid = load_grid(job.config)
    script = render(load_cluster(job.cluster), grid, grid.members, None)
    words = words_of(script)
    assert f"--job-name={name}" in words
    assert f"--comment={name}" in words
    output = str(job.directory.resolve()).replace("%", "%%")
    assert f"--output={output}/slurm-%j.txt" in words
    lines = script.splitlines()
    (srun,) = (line.strip() for line in lines if line.strip().startswith("srun "))
    assert f"--label={name}" in shlex.split(srun.removesuffix("\\"))
    assert f"module load {shlex.quote(name)}" in lines
    path = tmp_path / "job.sh"
    path.write_text(script)
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


def test_a_dry_run_shows_what_sbatch_says(tmp_path, corpus, monkeypatch, capsys):
    job = Job(tmp_path / "job", corpus, nodes=1, **{"tensor: 2": "tensor: 1"})
    for command, body in (
        ("scontrol", "exit 0"),
        ("sbatch", 'cat >/dev/null; echo "allocation failure: no such partition" >&2; exit 1'),
    ):
        path = tmp_path / command
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="sbatch would refuse this script: allocation failure: no"):
        job.launch("--dry-run")
    (tmp_path / "sbatch").write_text('#!/bin/sh\ntest "$1" = --test-only\n')
    assert job.launch("--dry-run") == 0
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    assert job.launch("--dry-run") == 0, "no Slurm answers"


def test_without_sbatch_or_with_uneven_processes(tmp_path, corpus, monkeypatch):
    job = Job(tmp_path / "job", corpus)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch on PATH"):
        job.launch()
    job = Job(tmp_path / "job", corpus, nodes=3)
    with pytest.raises(UserError, match="2 processes do not divide evenly over nodes = 3"):
        job.launch()
