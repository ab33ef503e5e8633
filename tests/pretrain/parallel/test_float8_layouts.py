"""Float8 on two tensor-parallel processes against one: the same numbers become float8."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import float8_worker
from tests.helpers.float8_worker import LAYERS, MIXERS, block, sharded_layer
from tests.helpers.processes import run_on
from tests.helpers.relative_error import relative_error

pytest.importorskip("torchao")
pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.slow]

# Of a sum of what two processes have rounded to bf16; with scales of their own it is three times
# that. What is no such sum has the same bits.
ROUNDING = 2.0**-7


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    path = tmp_path_factory.mktemp("float8") / "found.pt"
    run_on(2, float8_worker.__name__, path)
    return torch.load(path)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_two_processes_equals_one(name, two_processes):
    kind, _ = LAYERS[name]
    expected = sharded_layer(kind, False)
    assert two_processes[name].keys() == expected.keys()
    summed = "y" if kind == "row" else "x"
    for key, value in two_processes[name].items():
        if key == summed:
            assert relative_error(value, expected[key]) < ROUNDING
        else:
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("pattern", MIXERS)
def test_checkpointing_computes_the_same_bits(pattern, sequence, two_processes):
    found = two_processes[f"{pattern}{'-sequence' * sequence}"]
    kinds = ("none", "block", "selective")
    alone = {kind: block(pattern, False, kind) for kind in kinds}
    for plain, *others in ([f[kind] for kind in kinds] for f in (found, alone)):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
