"""What a run is expected to take, said before it starts."""

import pytest

from pretrain.planner.expectation import expected_time, known_hardware
from pretrain.planner.planned_run import load_planned
from pretrain.training import preflight


@pytest.mark.parametrize(
    ("name", "memory", "hardware"),
    [
        ("NVIDIA H100 80GB HBM3", 85e9, "h100"),
        ("NVIDIA H200", 150e9, "h200"),
        ("NVIDIA B200", 190e9, "b200"),
        ("NVIDIA A100-SXM4-40GB", 42e9, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 85e9, "a100-80gb"),
        ("NVIDIA L40S", 48e9, None),
    ],
)
def test_gpus_are_known_by_the_names_of_their_driver(name, memory, hardware):
    assert known_hardware(name, memory) == hardware


def test_time_and_memory_are_told_with_their_range():
    config = load_planned("410m/gdn-hybrid-3to1", [])
    assert config.model.vocab_size is not None
    told = expected_time(config, config.model.vocab_size, "h100", 8)
    assert told.startswith("planned: ") and " to " in told and "on 8 x H100" in told
    config = load_planned("410m/para-gru", [])
    assert config.model.vocab_size is not None
    assert "no range: " in expected_time(config, config.model.vocab_size, "h100", 8)


@pytest.mark.parametrize(
    ("hardware", "given", "wanted"),
    [
        (None, "chain", "chain"),
        (None, "auto", "heads"),  # on a CPU
        ("unknown", "auto", "chain"),
        ("unknown", "heads", "heads"),
        ("h100", "auto", "chain"),  # long documents through many layers
    ],
)
def test_cells_are_computed_as_is_planned_for_the_gpu(hardware, given, wanted, monkeypatch):
    known = None if hardware == "unknown" else hardware
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: hardware is not None)
    monkeypatch.setattr(preflight, "_known_hardware", lambda: known)
    monkeypatch.setattr(preflight, "world_size", lambda: 8)
    settings = ["train.seq_len=65536", "parallel.context=8", f"parallel.context_cells={given}"]
    config = load_planned("410m/m2rnn", settings)
    assert config.model.vocab_size is not None
    assert preflight.cells_over_segments(config, config.model.vocab_size) == wanted
