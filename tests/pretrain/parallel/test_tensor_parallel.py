"""Every mixer and every kind of loop on two tensor-parallel processes against one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.common.config_loader import ConfigError
from pretrain.model.layout import check_tensor_parallel
from tests.helpers import tensor_parallel_worker
from tests.helpers.processes import run_on
from tests.helpers.tensor_parallel_worker import (
    ACROSS,
    LAYOUTS,
    RECOMPUTED,
    cases,
    settings,
    train,
)

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("tensor") / "found.json"
    run_on(2, tensor_parallel_worker.__name__, path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_two_processes_equal_one(name, two_processes):
    expected = train(cases()[name])
    for kind in (name, f"{name}-sequence"):
        assert np.allclose(two_processes[kind], expected, rtol=1e-5), kind
        for checkpointing in ("block", "selective") if name in RECOMPUTED else ():
            assert two_processes[f"{kind}-{checkpointing}"] == two_processes[kind], checkpointing


@pytest.mark.slow
@pytest.mark.parametrize("name", ACROSS)
def test_checkpoints_load_under_another_layout(name, two_processes):
    """Tensor-parallel, then data-parallel, then tensor-parallel again, as if on one process."""
    expected = train(cases()[name], steps=len(LAYOUTS))
    assert np.allclose(two_processes[f"{name}-across"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        ({"gdn": {"num_heads": 6, "head_dim": 4}}, r"does not divide 6 \(.*gdn: num_heads\)"),
        ({"gdn": {"num_heads": 8, "head_dim": 4}}, r"does not divide 2 \(.*: num_kv_heads\)"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_fits(mixers, message):
    attn = {"num_heads": 4, "num_kv_heads": 2}
    config = settings("gdn attn", {**mixers, "attn": attn})
    with pytest.raises(ConfigError, match=f"parallel.tensor is 4, which {message}.*fits 1, 2$"):
        check_tensor_parallel(config, 4, "test")
    check_tensor_parallel(config, 2, "test")
    alone = settings("attn", {"attn": {"num_heads": 4, "num_kv_heads": 1}})
    check_tensor_parallel(alone, 4, "test")
    assert torch.distributed.get_world_size() == 1
