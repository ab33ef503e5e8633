"""Plans of rows that are cut into segments, one for each process."""

from __future__ import annotations

import json

import pytest

from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError
from pretrain.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.model.layout import check_layout
from pretrain.nn.mixers import registry
from pretrain.planner import report
from pretrain.planner.estimate import Planner
from pretrain.planner.hardware import load_hardware
from pretrain.planner.search import candidates
from pretrain.planner.units import busiest_segment
from tests.helpers.processes import ROOT

SEQ_LEN = 32768
EXPERTS = {"moe": {"num_experts": 4, "top_k": 1, "intermediate_size": 64, "balance_weight": 0}}


def planner(pattern, rows=1, seq_len=SEQ_LEN, hardware="h100", hidden_size=256, **model):
    values = {"hidden_size": hidden_size, "pattern": pattern, **model}
    train = TrainConfig(
        steps=1, seq_len=seq_len, precision="bf16", global_batch_tokens=rows * seq_len
    )
    config = RunConfig("test", build_config(ModelConfig, values, "test"), train=train)
    return Planner(config, 1024, load_hardware(ROOT / f"configs/hardware/{hardware}.yaml"))


def estimate(pattern, context, rows=1, devices=None, **given):
    names = "context_cells", "context_scans", "expert"
    layout = {name: given.pop(name) for name in names if name in given}
    parallel = ParallelConfig(context=context, micro_batch_size=rows, **layout)
    return planner(pattern, rows, **given).estimate(parallel, devices or context)


def test_segments_share_activations_and_work_and_the_optimizers_state():
    alone, shared = (estimate("2*(gdn attn)", n) for n in (1, 4))
    assert shared.memory["activations"] == pytest.approx(alone.memory["activations"] / 4, rel=0.2)
    assert shared.memory["optimizer"] == alone.memory["optimizer"] / 4
    assert shared.memory["weights"] == alone.memory["weights"]
    assert shared.hardware_flops == pytest.approx(alone.hardware_flops, rel=0.3)
    assert shared.model_flops == alone.model_flops
    assert shared.sent["data parallel"] == pytest.approx(6 * 3 / 4 * shared.stages[0].parameters)
    assert shared.sent["context parallel"] > 0 == alone.sent["context parallel"]


def waiting(pattern, context, **given):
    return estimate(pattern, context, context_cells="chain", **given).seconds["waiting for states"]


def test_layers_that_hand_states_on_wait_for_the_segments_before_once():
    """l layers take the time of l + n - 1, and again behind a layer that all enter together."""
    one, many = waiting("m2rnn", 4), waiting("8*m2rnn", 4)
    assert one > 0 and many == pytest.approx(one, rel=0.01)
    assert waiting("2*m2rnn attn 2*m2rnn", 4) == pytest.approx(2 * one, rel=0.01)
    # A step of a segment half as long is half as long, and there are three for one.
    assert one / waiting("m2rnn", 2) == pytest.approx(3 / 2, rel=0.1)
    alone = estimate("m2rnn", 1).seconds["compute"] / 4
    assert 3 * 0.5 * alone < one < 3.3 * alone


def test_a_ring_of_scans_waits_once_for_a_state_and_sends_less():
    ring, longer, gather = (
        estimate(pattern, 4, context_scans=scans)
        for pattern, scans in (("gdn", "ring"), ("4*gdn", "ring"), ("4*gdn", "gather"))
    )
    one, many = (e.seconds["waiting for states"] for e in (ring, longer))
    assert many == pytest.approx(one, rel=0.01)
    assert 0 < one < ring.seconds["compute"] / 2
    assert gather.seconds["waiting for states"] == 0
    assert longer.sent["context parallel"] < gather.sent["context parallel"] / 2
    two, same = (estimate("gdn", 2, context_scans=scans) for scans in ("auto", "ring"))
    assert two.seconds == same.seconds


def test_what_is_computed_again_does_not_wait():
    layout = ParallelConfig(context=4, micro_batch_size=1, context_cells="chain")
    found = [planner("2*m2rnn").estimate(layout, 4, kind).seconds for kind in ("none", "block")]
    plain, again = (seconds["waiting for states"] for seconds in found)
    assert again == pytest.approx(plain, rel=0.05)
    assert found[1]["compute"] > 1.2 * found[0]["compute"]


def test_nobody_waits_where_no_sequence_goes_on():
    found = estimate("2*(m2rnn attn)", 2, rows=2, context_cells="chain")
    assert found.seconds["waiting for states"] == found.seconds["context parallel"] == 0
    # Every second border lies inside a sequence: one segment waits, not three.
    assert waiting("m2rnn", 4, rows=2) == pytest.approx(waiting("m2rnn", 2, rows=1), rel=0.1)


def test_experts_on_several_segments_make_them_meet():
    apart, shared = (
        estimate("2*m2rnn", 2, context_cells="chain", expert=expert, **EXPERTS) for expert in (1, 2)
    )
    one, two = (e.seconds["waiting for states"] for e in (apart, shared))
    assert shared.sent["expert parallel"] > 0 and one > 0
    assert two == pytest.approx(2 * one, rel=0.01)


@pytest.mark.parametrize(
    ("pattern", "rows", "wanted"),
    [
        ("8*m2rnn", 1, "chain"),  # one document: steps wait for each other, and layers take turns
        ("m2rnn", 1, "heads"),  # nobody takes turns
        ("8*m2rnn", 31, "heads"),  # there is enough to do in a step
        ("8*gdn", 1, "auto"),  # there are none
    ],
)
def test_cells_are_computed_in_the_way_that_is_faster(pattern, rows, wanted):
    given = {"seq_len": SEQ_LEN // 8 if rows > 1 else SEQ_LEN, "hidden_size": 1024}
    found = estimate(pattern, 4, rows=rows, **given)
    assert found.parallel.context_cells == wanted
    if wanted != "auto":
        ways = [
            estimate(pattern, 4, rows=rows, context_cells=way, **given).step_seconds
            for way in ("heads", "chain")
        ]
        assert found.step_seconds == min(ways) < max(ways)


def test_cells_go_over_heads_on_a_cpu_where_there_are_enough():
    small = {"hardware": "cpu", "seq_len": 32, "mixers": {"gru": {"num_heads": 2}}}
    for context, method in ((2, "heads"), (4, "chain")):
        found = estimate("gru", context, hidden_size=32, **small)
        other = estimate("gru", context, hidden_size=32, context_cells=method, **small)
        assert found.seconds == other.seconds
        assert (found.seconds["waiting for states"] > 0) == (method == "chain")


@pytest.mark.parametrize(("name", "states"), [("para_gru", 1), ("para_lstm", 2)])
def test_kernels_of_para_rnn_go_over_channels(name, states):
    """docs/parallel.md: as other cells over heads; no rounds of borders."""
    size, width, tokens = 4, 256, 4096
    layout = ParallelConfig(context=size, micro_batch_size=1)
    unit = planner(name, seq_len=tokens).units(layout, "none").blocks[name]
    state, convolved = 4 * states * width, 2 * 2 * 3 * width
    each = 2 * tokens / size * width * (3 + 1) + state
    expected = (size - 1) / size * 2 * each + state / size + convolved
    assert unit.forward.context_bytes + unit.backward.context_bytes == pytest.approx(expected)


def test_too_few_heads_are_refused():
    config = planner("gru", mixers={"gru": {"num_heads": 2}}).config
    config.parallel = ParallelConfig(context=4, micro_batch_size=1, context_cells="heads")
    with pytest.raises(UserError, match="gru has 2 heads on a process, fewer than parallel"):
        check_layout(config, 4, "test")


def test_states_that_grow_are_not_planned(monkeypatch):
    monkeypatch.setattr(registry()["rat"], "over_time", "state")
    with pytest.raises(UserError, match="the states that rat layers hand on grow with what they"):
        estimate("rat", 2)


@pytest.mark.parametrize(
    ("rows", "segments", "busiest"), [(1, 2, 1), (1, 4, 2), (2, 4, 1), (1, 8, 6), (3, 4, 1)]
)
def test_the_planned_segment_receives_and_sends(rows, segments, busiest):
    assert busiest_segment(rows, segments) == busiest


def test_a_search_cuts_long_sequences(tmp_path, capsys):
    contexts = {
        length: {layout.context for layout in candidates(8, 8, seq_len=length)}
        for length in (4096, 32768, 131072)
    }
    assert contexts == {4096: {1}, 32768: {1, 2, 4}, 131072: {1, 2, 4, 8}}
    path = tmp_path / "found.json"
    given = ["train.seq_len=65536", "train.global_batch_tokens=65536", "model.vocab_size=4096"]
    words = ["configs/models/tiny-gdn-hybrid.yaml", *given, "--search", "--devices", "2"]
    report.main([*words, "--json", str(path)])
    assert "CP2" in capsys.readouterr().out  # of one sequence nothing else is there to divide
    fits = [c["parallel"] for c in json.loads(path.read_text()) if c["why_not"] is None]
    assert fits[0]["context"] > 1
