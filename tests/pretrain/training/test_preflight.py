"""What is said, or refused, before a run starts: memory, repeated data, the time left."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain import ConfigError, Trainer, UserError
from pretrain.common.config_loader import build_config
from pretrain.config import ParallelConfig, RunConfig, load_run_config
from pretrain.model.counts import count_model
from pretrain.model.spec import with_sizes
from pretrain.planner.estimate import Planner
from pretrain.planner.hardware import load_hardware
from pretrain.training import free_memory as measuring
from pretrain.training import preflight as checks
from pretrain.training.free_memory import free_memory
from pretrain.training.preflight import check_memory, repeated_data
from tests.helpers.processes import ROOT

VOCAB = 512
MOE = {"num_experts": 4, "top_k": 1, "intermediate_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "attention": {"pattern": "8*attn"},
    "hybrid": {"pattern": "4*(gdn attn)", "tie_embeddings": False},
    "experts": {"pattern": "8*attn", "moe": MOE},
    "loop": {"pattern": "8*attn", "recursion": {"times": 3, "lora_rank": 2}},
}


def config_of(name, **changes):
    values = {
        "name": "big",
        "model": {
            "hidden_size": 64,
            "mixers": {"attn": {"num_heads": 4}, "gdn": {"num_heads": 4, "head_dim": 8}},
            **MODELS[name],
        },
        "data": {"path": "nowhere"},
        "train": {"steps": 10, "seq_len": 32, "global_batch_tokens": 8192},
        "schedule": {"warmup_steps": 1},
        "parallel": {"micro_batch_size": 2},
        **changes,
    }
    config = build_config(RunConfig, values, "test")
    config.model = with_sizes(config.model, "test")
    return config


def state_of(config, count=1):
    planner = Planner(config, VOCAB, load_hardware(ROOT / "configs/hardware/cpu.yaml"))
    return max(sum(s.values()) for s in planner.state_memory(config.parallel, count))


def check(config, monkeypatch, free, count=1):
    monkeypatch.setattr(checks, "free_memory", lambda: free)
    parameters = count_model(config.model, VOCAB, config.train.seq_len).parameters
    return check_memory(config, VOCAB, parameters, count)


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2, "zero_stage": 0},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"zero_stage": 2, "zero_backend": "deepspeed"},
    {"zero_stage": 3, "zero_backend": "deepspeed"},
]
POSSIBLE = [
    (name, layout)
    for name in MODELS
    for layout in LAYOUTS
    if not (name == "experts" and "zero_backend" in layout)
    and not (name == "loop" and "pipeline" in layout)  # which stays in one stage
]


@pytest.mark.parametrize(("name", "layout"), POSSIBLE)
def test_the_state_is_the_plan_s(name, layout):
    config = config_of(name)
    planner = Planner(config, VOCAB, load_hardware(ROOT / "configs/hardware/cpu.yaml"))
    parallel = ParallelConfig(micro_batch_size=2, **layout)
    planned = [stage.memory for stage in planner.estimate(parallel, 4).stages]
    kinds = ("weights", "gradients", "optimizer")
    expected = [{kind: memory[kind] for kind in kinds} for memory in planned]
    assert planner.state_memory(parallel, 4) == expected


@pytest.mark.parametrize("name", MODELS)
def test_what_cannot_fit_is_refused_with_a_layout_that_does(name, monkeypatch):
    config = config_of(name)
    state = state_of(config)
    free = 0.6 * state
    with pytest.raises(UserError, match="big does not fit: the weights, gradients") as refused:
        check(config, monkeypatch, free)
    message = str(refused.value)
    assert "--force starts it as it is" in message
    found = re.search(r"(\d+) processes on \1 such machines with (.*?) would fit", message)
    assert found is not None, message
    count = int(found[1])
    values = dict(word.removeprefix("parallel.").split("=") for word in found[2].split())
    layout = build_config(
        ParallelConfig,
        {"micro_batch_size": 2}
        | {
            key: value == "true"
            if value in ("true", "false")
            else value
            if key == "zero_backend"
            else int(value)
            for key, value in values.items()
        },
        "test",
    )
    advised = config_of(name)
    advised.parallel = layout
    assert state_of(advised, count) <= 0.7 * free
    assert check(advised, monkeypatch, free, count) is None


def test_activations_that_cannot_fit_are_warned_of(monkeypatch):
    config = config_of("attention")
    state = state_of(config)
    inputs = 8 * 2 * 32 * 64 * 4  # blocks, rows, tokens, channels, bytes
    assert check(config, monkeypatch, 100 * (state + inputs)) is None
    assert check(config, monkeypatch, state + inputs) is None
    warning = check(config, monkeypatch, state + inputs - 1)
    assert warning is not None
    assert "expected a smaller parallel.micro_batch_size" in warning


def test_a_model_that_fits_nowhere_says_so(monkeypatch):
    with pytest.raises(UserError, match="no layout of up to 4,096 such processes would fit"):
        check(config_of("attention"), monkeypatch, 1000.0)


def test_free_memory_is_within_the_limits_of_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measuring, "_CONTROL_GROUPS", ())
    machine = free_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory() == pytest.approx(machine / 4, rel=0.2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    names = ("memory.max", "memory.current", "")
    monkeypatch.setattr(measuring, "_CONTROL_GROUPS", ((str(tmp_path), *names),))
    lines = (measuring.Path("/proc/self/cgroup")).read_text().splitlines()
    path = next(line.split(":", 2)[2] for line in lines if line.split(":", 2)[1] in ("", "memory"))
    own = tmp_path / path.strip("/")
    own.mkdir(parents=True, exist_ok=True)
    for folder, limit in ((own, "max"), (tmp_path, "1000000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("400000")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 60000\nactive_file 40000\n")
    assert free_memory() == 700_000


@pytest.mark.parametrize(
    ("epochs", "warning"),
    [
        ([4.0, 0.5], None),
        ([4.2, 0.5], "reads a 4.2 times; data that is repeated more than about 4 times"),
        ([10071.3, 5.0], "reads a 10,071 times, b 5.0 times; data"),
        ([5.0] * 6, "a 5.0 times, b 5.0 times, c 5.0 times and 3 other sources; data"),
    ],
)
def test_repeated_data_is_warned_of(epochs, warning):
    batches: Any = SimpleNamespace(
        names=[f"{letter}@1234" for letter in "abcdef"[: len(epochs)]], epochs=lambda steps: epochs
    )
    found = repeated_data(batches, 10)
    assert (warning or "") in (found or "")
    assert (warning is None) == (found is None)


def test_a_run_that_does_not_fit_trains_when_forced(run, no_groups, monkeypatch, capsys):
    monkeypatch.setattr(checks, "free_memory", lambda: 1000.0)
    with pytest.raises(UserError, match="does not fit"):
        Trainer(run.config).fit()
    directory = load_run_config(run.config).run_directory
    assert not directory.exists(), "nothing was written"
    assert Trainer(run.config, force=True).fit().status == "completed"
    assert "warning: tiny does not fit" in capsys.readouterr().out


def test_the_time_left_is_told_once_it_is_measured(run, no_groups, capsys):
    for every, told in ((100, 1), (1, 0), (2, 0)):
        overrides = [f"logging.every={every}", f"name=left-{every}", "train.steps=5"]
        directory = load_run_config(run.config).run_directory.with_name(f"left-{every}")
        Trainer(run.config, overrides=[*overrides, f"directory={directory}"]).fit()
        shown = capsys.readouterr().out
        assert len(re.findall(r"about 0:\d\d left, at the [\d,]+ tokens/s of the", shown)) == told


def test_a_run_directory_inside_a_data_set_is_refused(run, corpus, tmp_path, no_groups):
    before = sorted(p.name for p in corpus.iterdir())
    for inside in (corpus, corpus / "runs" / "mine"):
        with pytest.raises(ConfigError, match=r"the run directory .* is in the data set .*/data,"):
            Trainer(run.config, overrides=[f"directory={inside}"]).fit()
    assert sorted(p.name for p in corpus.iterdir()) == before
    (tmp_path / "manifest.json").write_text("{}")  # of something else
    assert Trainer(run.config, overrides=["train.steps=3"]).fit().status == "completed"
