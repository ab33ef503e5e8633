"""Every mixer over the segments of a row equals itself over the whole row, in real processes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.config import ParallelConfig, RunConfig, TrainConfig
from pretrain.data.sequences import Sequences, segment_of
from pretrain.model.spec import block_specs
from pretrain.nn.mixers import registry
from pretrain.ops.rnn.cells import CELLS as CELLS_OF_OPS
from pretrain.planner.estimate import Planner
from pretrain.planner.hardware import load_hardware
from tests.helpers import segment_worker
from tests.helpers.processes import ROOT, run_on
from tests.helpers.segment_worker import LONG, TOKENS
from tests.helpers.small_mixers import SMALL
from tests.helpers.tensor_parallel_worker import settings

pytestmark = pytest.mark.usefixtures("processes")

NEWTON = ("para_gru", "para_lstm")


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("segments") / "results.json"
    run_on(4, segment_worker.__name__, file)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sorted(registry()), "leaky_average"])
def test_outputs_states_and_gradients_are_those_of_the_whole_row(name, four_processes):
    found = four_processes["errors"]
    cases = {key: error for key, error in found.items() if key.split()[0] == name}
    assert len(cases) >= 2 * len(segment_worker.LAYOUTS)
    limit = 1e-9 if name in NEWTON else 1e-10
    assert {key: error for key, error in cases.items() if not error[0] <= limit} == {}


@pytest.mark.slow
def test_blocks_that_do_not_train_leave_no_rank_waiting(four_processes):
    found = {k: e for k, e in four_processes["errors"].items() if k.startswith("frozen")}
    assert len(found) == 2 * len(segment_worker.LAYOUTS)
    assert {key: error for key, error in found.items() if not error[0] <= 1e-10} == {}


CELLS = [name for name, mixer in sorted(registry().items()) if mixer.over_time == "cells"]


def planned_unit(name, values, size, cells, scans="auto"):
    config = RunConfig(
        "test",
        settings(name, {name: values}),
        train=TrainConfig(steps=1, seq_len=LONG.get(name, TOKENS), precision="float32"),
    )
    planner = Planner(config, 16, load_hardware(ROOT / "configs/hardware/cpu.yaml"))
    layout = ParallelConfig(
        context=size, micro_batch_size=1, context_cells=cells, context_scans=scans
    )
    return planner.units(layout, "none").blocks[name]


def bytes_by_the_table(name, mixer, config, size, over_heads, ring=False):
    """docs/parallel.md, for a document that fills the row, in float32."""
    tokens, states = TOKENS / size, mixer.init_state(1)
    both = 2 if size > 2 else 1  # the ranks at the ends of a row send to one side
    convolved = sum(x.nbytes for key, x in states.items() if key.endswith(("conv", "shift")))
    matrices = [x for x in states.values() if x.ndim == 4]
    floating = sum(x.nbytes for x in states.values() if x.is_floating_point())
    scanned = mixer.over_time == "ops" and name not in ("attn", "swa", "rat", *NEWTON)
    if (mixer.over_time != "ops" and not over_heads) or (scanned and (ring or size == 2)):
        return both * floating
    if name in CELLS_OF_OPS:
        moved = 4 * tokens * 24 * (CELLS_OF_OPS[name].gates + 1) + floating
        return 2 * (size - 1) / size * moved + floating / size
    if name == "attn":
        heads, kv_heads = config.num_heads, max(config.num_kv_heads, size)
        return 4 * tokens * mixer.head_dim * (size - 1) / size * 4 * (heads + kv_heads)
    if name == "swa":
        return both * 4 * 2 * 24 * (config.window - 1)
    if name in (
        "hgrn",
        "quasi_lstm",
    ):  # a segment's end, its decay, and the gradient on the way back
        return both * convolved + (size - 1) * 4 * 3 * (floating - convolved) / 4
    if name in LONG:  # two rounds of borders
        elements = sum(x.numel() for key, x in states.items() if not key.endswith("conv"))
        rounds = 1 + 2 * (mixer.num_states + 2)
        return both * convolved + (size - 1) * 4 * elements * rounds
    if name == "rat":
        ends = TOKENS // config.chunk_size + 1
        return (size - 1) / size * 24 * (10 * 4 * tokens + 16 * ends)
    _, heads, key_dim, value_dim = matrices[0].shape
    if name == "m2rnn":  # every rank needs the keys and queries that its heads share
        state = 4 * matrices[0].numel()
        moved = 4 * tokens * (heads * (2 * value_dim + 1) + 2 * size * key_dim) + state
        return both * convolved + 2 * (size - 1) / size * moved + state / size
    transition = {"linear_attn": 1, "retnet": 1, "mamba2": 1}
    transition |= dict.fromkeys(("gla", "hgrn2", "mamba"), key_dim)
    maps = transition.get(name, key_dim**2) + 2 * key_dim * value_dim
    return both * convolved + (size - 1) * 4 * heads * maps


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [*sorted(registry()), *(f"{name} over heads" for name in CELLS)])
def test_bytes_are_those_of_the_plan_and_of_the_table(name, size, four_processes):
    name, _, over_heads = name.partition(" over ")
    values: dict[str, Any] = {"num_heads": 4} if over_heads else SMALL.get(name, [{}])[0]
    if name == "sliced_attn":  # hands on all keys so far, as many as there are
        with pytest.raises(UserError, match="grow with what they have seen, which is not planned"):
            planned_unit(name, values, size, "chain")
        return
    sent = four_processes["sent"][f"{name} over heads" if over_heads else name][str(size)]
    unit = planned_unit(name, values, size, "heads" if over_heads else "chain")
    planned = unit.forward.context_bytes + unit.backward.context_bytes
    mixer = segment_worker.block_of(name, values, torch.float32).mixer
    assert planned == pytest.approx(sent, rel=0.002)
    assert (unit.unchained is not None) == (mixer.over_time != "ops" and not over_heads)
    (spec,) = block_specs(settings(name, {name: values}))
    table = bytes_by_the_table(name, mixer, spec.config, size, over_heads)
    assert sent == pytest.approx(table, rel=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gdn", "gla", "hgrn", "kda", "mamba", "mamba2", "rwkv7"])
def test_bytes_of_a_ring_are_those_of_the_plan_and_of_the_table(name, four_processes):
    values, sent = SMALL[name][0], four_processes["sent"][f"{name} ring"]["4"]
    unit = planned_unit(name, values, 4, "chain", "ring")
    planned = unit.forward.context_bytes + unit.backward.context_bytes
    (spec,) = block_specs(settings(name, {name: values}))
    mixer = segment_worker.block_of(name, values, torch.float32).mixer
    table = bytes_by_the_table(name, mixer, spec.config, 4, over_heads=False, ring=True)
    assert planned == pytest.approx(sent, rel=0.002)
    assert sent == pytest.approx(table, rel=0.002)
    assert sent < four_processes["sent"][name]["4"]


@pytest.mark.parametrize("name", ["attn", "gdn", "rat"])
def test_where_no_sequence_goes_on_nothing_is_sent(name):
    """There is nobody to send to: any message would fail."""
    block = segment_worker.block_of(name, SMALL[name][0])
    x = torch.randn(48, 1, 24, dtype=torch.float64)
    whole, _ = block(x, sequences=Sequences.from_lengths([12, 5, 7, 24]))
    nobody = object()
    pieces = segment_of(Sequences.from_lengths([12, 5, 7, 24]), 1, 2, nobody)
    found, _ = block(x[24:], sequences=pieces)
    assert torch.allclose(found, whole[24:], rtol=1e-12)


def test_a_segment_of_full_attention_takes_no_keys_from_another_row():
    block = segment_worker.block_of("attn", SMALL["attn"][0])
    x = torch.zeros(24, 1, 24, dtype=torch.float64)
    pieces = segment_of(Sequences.from_lengths([48]), 1, 2, object())
    with pytest.raises(ValueError, match=r"without a window .* found a state"):
        block(x, sequences=pieces, state=block.mixer.init_state(1))
