"""The planner's figures against real processes, the mixers' own counts and formulas."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.common.config_loader import ConfigError, build_config
from pretrain.common.errors import UserError
from pretrain.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.model.build import build_model
from pretrain.model.carried import CarriedStates
from pretrain.model.counts import block_flops, block_parameters, count_model
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs
from pretrain.nn.mixers import registry
from pretrain.nn.parameters import info_of
from pretrain.optim.optimizer import rule_of
from pretrain.parallel.cpu import importing_megatron
from pretrain.planner import report
from pretrain.planner.estimate import Planner
from pretrain.planner.fake_group import planned_context
from pretrain.planner.hardware import load_hardware
from pretrain.planner.memory import Memory, _largest_share
from pretrain.planner.software import Software
from pretrain.training.metrics import PEAK_FLOPS
from tests.helpers.memory_worker import CASES, FOUR_CASES, MORE_CASES, VOCAB, case
from tests.helpers.planner_figures import measure, plan
from tests.helpers.processes import ENVIRONMENT, ROOT, run
from tests.helpers.small_mixers import SMALL

with importing_megatron():
    from megatron.core.optimizer import layer_wise_optimizer
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer


@pytest.fixture(scope="module")
def planned():
    return plan({n: {"settings": settings, "devices": 2} for n, settings in CASES.items()})


@pytest.fixture(scope="module")
def measured():
    return measure(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_memory_is_what_processes_allocate(planned, measured, name):
    stages, found = planned[name]["memory"], measured[name]
    expected = stages if len(stages) > 1 else stages * 2
    for wanted, got in zip(expected, found, strict=True):
        assert wanted == pytest.approx(got, rel=0.1), f"planned / measured {wanted / got:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_CASES)
def test_memory_is_what_four_processes_allocate(name):
    (planned,) = plan({name: {"settings": FOUR_CASES[name], "devices": 4}})[name]["memory"]
    for got in measure([name], 4)[name]:
        assert planned == pytest.approx(got, rel=0.1), f"planned / measured {planned / got:.3f}"


LIKE_WHOLE = {
    # A mask hides what lies beyond a window, but it is computed.
    "swa": {"window": 64},
    # Of 64 tokens both forms see as many pairs.
    "sliced_attn": {"slice_size": 8, "stride": 8},
}


@pytest.fixture(scope="module")
def every_mixer():
    """A block of each kind, 64 tokens, MLP included."""
    model = {
        "hidden_size": 48,
        "pattern": " ".join(registry()),
        "mixers": {
            name: {**SMALL.get(name, [{}])[0], **LIKE_WHOLE.get(name, {})} for name in registry()
        },
    }
    settings = {
        "model": model,
        "parallel": {"micro_batch_size": 1},
        "seq_len": 64,
        "rows": 1,
        "precision": "float32",
        "checkpointing": "none",
    }
    return settings, plan({"all": {"settings": settings, "devices": 1}})["all"]


@pytest.mark.parametrize("name", registry())
def test_flops_and_parameters_are_the_layers_own_counts(every_mixer, name):
    settings, found = every_mixer
    config = build_config(ModelConfig, settings["model"], "case")
    spec = next(s for s in block_specs(config) if s.name == name)
    assert found["parameters"][name] == block_parameters(config, spec)
    counted = 64 * block_flops(config, spec, 64)
    counted += spec.mixer.flops_per_pass(spec.config, config.hidden_size)
    # Newton's method solves scans, whose matrices' products are not the layer's own.
    assert found["forward"][name] == pytest.approx(counted, rel=0.005)
    assert found["backward"][name] == pytest.approx(2 * counted, rel=0.15)


def test_recomputation_is_what_checkpointing_does():
    base = MORE_CASES["dp2"]
    found = plan(
        {
            kind: {"settings": {**base, "checkpointing": kind, "rows": 1}, "devices": 1}
            for kind in ("none", "selective", "block")
        }
    )
    config = build_config(ModelConfig, base["model"], "case")
    counts = count_model(config, VOCAB, base["seq_len"])
    more = found["block"]["hardware_flops"] - found["none"]["hardware_flops"]
    told = (counts.hardware_flops() - counts.training_flops()) * base["seq_len"]
    assert more == pytest.approx(told, rel=0.005)
    assert found["block"]["model_flops"] == found["none"]["model_flops"]
    assert found["none"]["model_flops"] == pytest.approx(found["none"]["hardware_flops"], rel=0.05)
    assert found["selective"]["hardware_flops"] == found["none"]["hardware_flops"]
    memory = [max(found[kind]["memory"]) for kind in ("block", "selective", "none")]
    assert memory == sorted(set(memory))


@pytest.mark.usefixtures("processes")
@pytest.mark.slow
def test_states_that_rows_carry_are_counted():
    base = case("gdn swa slstm", seq_len=256, rows=4) | {"precision": "bf16"}
    settings = {"without": base, "carried": {**base, "carry_state": True}}
    found = plan({name: {"settings": s, "devices": 1} for name, s in settings.items()})
    config = build_config(ModelConfig, base["model"], "case")
    model = build_model(config, VOCAB, seed=0, dtype=torch.bfloat16)
    parts = [part for _, parts in CarriedStates(model, 2, 2).parts().values() for part in parts]
    more = found["carried"]["memory"][0] - found["without"]["memory"][0]
    assert more == pytest.approx(sum(values.nbytes for _, values in parts), rel=0.01)


def test_segments_are_made_twice_forward_in_the_memory_of_one():
    base = case("2*gdn", seq_len=2048, rows=1)
    settings = {"whole": base, "segments": {**base, "segment_tokens": 256}}
    found = plan({name: {"settings": s, "devices": 1} for name, s in settings.items()})
    whole, segments = found["whole"], found["segments"]
    assert segments["model_flops"] == whole["model_flops"]
    more = segments["hardware_flops"] - whole["hardware_flops"]
    assert more == pytest.approx(whole["model_flops"] / 3, rel=0.05)
    assert segments["seconds"]["compute"] > 1.2 * whole["seconds"]["compute"]
    short = plan({"short": {"settings": case("2*gdn", seq_len=256, rows=1), "devices": 1}})["short"]
    assert short["memory"][0] < segments["memory"][0] < 1.1 * short["memory"][0]
    assert segments["memory"][0] < 0.6 * whole["memory"][0]


def test_bytes_are_those_of_the_formulas():
    """docs/parallel.md; benchmarks/parallel_cpu.py measures the same formulas."""
    blocks, width, tokens = 4, 512, 1024
    found = plan(
        {
            name: {
                "settings": {**case("4*attn", seq_len=tokens), "parallel": parallel},
                "devices": 4,
            }
            for name, parallel in {
                "tp2": {"micro_batch_size": 1, "tensor": 2},
                "tp2-sequence": {"micro_batch_size": 1, "tensor": 2, "sequence": True},
                "pp2": {"micro_batch_size": 1, "pipeline": 2},
            }.items()
        }
    )
    activations = 2 * 4 * tokens * width  # there and back, float32
    for name, exchanges in (("tp2", 4), ("tp2-sequence", 5)):
        # 2 micro-batches for each of 2 data-parallel processes; each collective sends half.
        expected = 2 * (exchanges * blocks + 2) * activations / 2
        assert found[name]["sent"]["tensor parallel"] == pytest.approx(expected, rel=0.02)
    assert found["pp2"]["sent"]["pipeline"] == 2 * activations
    assert found["pp2"]["seconds"]["pipeline bubble"] > 0


@pytest.mark.parametrize(("kind", "moments"), [("adamw", 2), ("muon", 1)])
def test_optimizer_state_is_what_the_rules_keep(kind, moments):
    """Muon one tensor for each matrix, AdamW two of everything else."""
    config = RunConfig("test", ModelConfig("2*attn", 64), optimizer=OptimizerConfig(kind))
    hardware = load_hardware(ROOT / "configs/hardware/cpu.yaml")
    memory, parallel = Memory(config, 256, hardware, Software()), ParallelConfig(zero_stage=0)
    with torch.device("meta"):
        model = LanguageModel(config.model, 256, planned_context(torch.float32, 1))
    infos = [(info_of(p), p.numel()) for p in model.parameters()]
    matrices = sum(n for info, n in infos if info.matrix)
    tensors = [((torch.float32, i.weight_decay, rule_of(i, kind)), n) for i, n in infos]
    found = memory.held(parallel, tensors, [], 1)["optimizer"]
    assert found == 4 * moments * matrices + 8 * (sum(n for _, n in infos) - matrices)
    assert matrices


@pytest.mark.parametrize("sequence", [False, True])
def test_processes_of_a_tensor_group_share_the_products(sequence):
    config = RunConfig("test", ModelConfig("2*attn", 64), train=TrainConfig(steps=1, seq_len=32))
    planner = Planner(config, 256, load_hardware(ROOT / "configs/hardware/h100.yaml"))
    alone = planner.units(ParallelConfig(), "none").blocks
    shared = planner.units(ParallelConfig(tensor=2, sequence=sequence), "none").blocks
    for kind, unit in alone.items():
        assert unit.forward.flops == 2 * shared[kind].forward.flops
        assert unit.backward.flops == 2 * shared[kind].backward.flops
        assert unit.backward.flops > unit.forward.flops > 0


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_whole_parameters_are_dealt_out_as_megatron_core_does(shards, monkeypatch):
    generator = np.random.default_rng(shards)
    sizes = generator.integers(1, 10**6, 41).tolist()
    dealing: Any = LayerWiseDistributedOptimizer.__new__(LayerWiseDistributedOptimizer)
    dealing.pg_collection = SimpleNamespace(dp_cp=shards, expt_dp=1)
    monkeypatch.setattr(layer_wise_optimizer, "get_pg_size", lambda group: group)
    monkeypatch.setattr(layer_wise_optimizer, "get_pg_rank", lambda group: 0)
    parameters = [torch.empty(size, device="meta") for size in sizes]
    dealing.shard_params([SimpleNamespace(param_groups=[{"params": parameters}])])
    most = max(sum(p.numel() for p in dealt) for dealt in dealing.dp_cp_params_list)
    assert _largest_share([(size, 4.0 * size) for size in sizes], shards) == 4 * most


def command(*arguments):
    environment = {**ENVIRONMENT, "COLUMNS": "200"}
    return run("pretrain", "plan", *arguments, environment=environment)


def test_search_lists_what_fits_and_says_why_the_rest_does_not(tmp_path):
    path = tmp_path / "found.json"
    done = command(
        "configs/models/tiny-gdn-hybrid.yaml",
        "model.vocab_size=4096",
        "train.seq_len=256",
        "train.global_batch_tokens=8192",
        "--search",
        "--devices",
        4,
        "--json",
        path,
        "--hardware",
        tmp_path / "small.yaml",
    )
    assert done.returncode == 2 and "small.yaml" in done.stderr
    hardware = (ROOT / "configs/hardware/cpu.yaml").read_text()
    small = "\n".join(
        "memory_gb: 0.1" if x.startswith("memory_gb") else x for x in hardware.splitlines()
    )
    (tmp_path / "small.yaml").write_text(small)
    done = command(
        "configs/models/tiny-gdn-hybrid.yaml",
        "model.vocab_size=4096",
        "model.mixers.gdn.num_heads=3",
        "train.seq_len=256",
        "train.global_batch_tokens=8192",
        "--search",
        "--devices",
        4,
        "--json",
        path,
        "--hardware",
        tmp_path / "small.yaml",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    fits = [c for c in found if c["why_not"] is None]
    limit = fits[0]["memory_limit"]
    seconds = [c["step_seconds"] for c in fits]
    assert len(fits) > 3 and seconds == sorted(seconds)
    assert all(max(s["total"] for s in c["memory"]) <= limit for c in fits)
    too_large = [c for c in found if c["why_not"] and "memory" in c]
    assert too_large and all(max(s["total"] for s in c["memory"]) > limit for c in too_large)
    impossible = [c["why_not"] for c in found if "memory" not in c]
    assert any("num_heads" in why for why in impossible)  # three heads do not divide by two
    assert "fastest: parallel.tensor=" in done.stdout and "not possible" in done.stdout


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (1000000007, "no layout of 1,000,000,007 devices is possible; with the 32 sequences of "),
        (
            7,
            "7 devices is possible; with the 32 sequences of train.global_batch_tokens, 4 would be",
        ),
    ],
)
def test_a_search_that_finds_nothing_says_what_would_fit(devices, words, capsys):
    given = ["train.seq_len=256", "train.global_batch_tokens=8192", "model.vocab_size=4096"]
    model = "configs/models/tiny-gdn-hybrid.yaml"
    with pytest.raises(UserError, match=words):
        report.main([model, *given, "--search", "--devices", str(devices)])
    assert "0 of" in capsys.readouterr().out


def test_what_is_too_large_for_all_layouts_is_told_by_the_nearest(tmp_path, capsys):
    hardware = (ROOT / "configs/hardware/cpu.yaml").read_text()
    lines = ["memory_gb: 1e-3" if x.startswith("memory_gb") else x for x in hardware.splitlines()]
    (tmp_path / "small.yaml").write_text("\n".join(lines))
    given = ["train.seq_len=256", "train.global_batch_tokens=8192", "model.vocab_size=4096"]
    search = ["--search", "--devices", "2", "--hardware", str(tmp_path / "small.yaml")]
    with pytest.raises(UserError, match=r"no layout of 2 devices fits, the nearest needs .* GB"):
        report.main(["configs/models/tiny-gdn-hybrid.yaml", *given, *search])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "{folder}"], "--json is .*, a folder; expected a file"),
        (["--json", "{folder}/file/x.json"], "but .*/file is a file; expected a folder there"),
        (["--search", "--top", "0"], "--top is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(tmp_path, words, message, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(report, "Planner", None)
    with pytest.raises(UserError, match=message):
        report.main(["configs/runs/demo.yaml", *(w.format(folder=tmp_path) for w in words)])


def test_figures_are_written_into_a_new_folder(tmp_path):
    path = tmp_path / "new" / "figures.json"
    model = ["configs/models/tiny-gdn-hybrid.yaml", "model.vocab_size=4096"]
    assert report.main([*model, "--json", str(path)]) == 0
    assert json.loads(path.read_text())


def test_plan_of_a_run_reads_well(tmp_path):
    done = command(
        "configs/models/tiny-gdn-hybrid.yaml",
        "model.vocab_size=4096",
        "--hardware",
        "configs/hardware/cpu.yaml",
        "--json",
        tmp_path / "plan.json",
    )
    assert done.returncode == 0, done.stderr
    for word in ("embedding", "gdn", "attn", "optimizer", "tokens/s", "device-hours"):
        assert word in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert 0 < found["mfu"] < 1 and found["hours"] > 0


def test_a_plan_has_the_steps_tokens_and_hours_of_each_phase(tmp_path, capsys):
    config = ["configs/runs/three-phases.yaml", "model.vocab_size=512", "train.tokens=100000"]
    path = tmp_path / "plan.json"
    assert report.main([*config, "--hardware", "cpu", "--json", str(path)]) == 0
    printed, found = capsys.readouterr().out, json.loads(path.read_text())
    short, stable, decay = found["phases"]
    assert [(p["steps"], p["tokens"]) for p in found["phases"]] == [
        (20, 20 * 1024),
        (25, 25 * 2048),
        (14, 14 * 2048),
    ]
    assert "59 steps (0.10M tokens) in 3 phases" in printed
    assert short["seq_len"] == 128 and stable["peak_memory"] > short["peak_memory"]
    assert stable["tokens_per_second"] == decay["tokens_per_second"] == found["tokens_per_second"]
    assert found["hours"] * 3600 == pytest.approx(sum(p["seconds"] for p in found["phases"]))
    assert decay["learning_rates"][0] == 4e-3 > decay["learning_rates"][1] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["configs/models/tiny-gdn-hybrid.yaml"], ["model.vocab_size is not set"]),
        (["configs/none.yaml"], ["configs/none.yaml"]),
        (
            [
                "configs/models/tiny-gdn-hybrid.yaml",
                "model.vocab_size=512",
                "train.precision=bf16",
                "--hardware",
                "{tmp}/odd.yaml",
            ],
            ["peak_tflops", "bf16"],
        ),
        (
            ["configs/models/tiny-gdn-hybrid.yaml", "model.vocab_size=513", "parallel.tensor=3"],
            ["parallel.tensor is 3", "num_heads"],
        ),
    ],
)
def test_bad_input_is_told_in_a_sentence(tmp_path, arguments, words):
    (tmp_path / "odd.yaml").write_text("{name: odd, memory_gb: 1, peak_tflops: {float32: 1}}")
    done = command(*(a.format(tmp=tmp_path) for a in arguments))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("name", ["h100", "h200", "b200", "cpu"])
def test_hardware_files_hold(name):
    hardware = load_hardware(ROOT / f"configs/hardware/{name}.yaml")
    assert hardware.memory_bytes > 1e9 and hardware.peak_flops("float32") > 0
    if hardware.device == "cuda":  # what runs measure themselves against
        assert hardware.peak_flops("bf16") == PEAK_FLOPS[name.upper()]
    with pytest.raises(ConfigError, match="peak_tflops"):
        hardware.peak_flops("int4")
