"""What a run is expected to take, said before it starts."""

import pytest

from pretrain.planner.expectation import expected_time, known_hardware
from pretrain.planner.planned_run import load_planned


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
