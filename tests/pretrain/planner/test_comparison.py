"""Ranges of plans, and architectures beside each other."""

import dataclasses
import json

import pytest

from pretrain.common.errors import UserError
from pretrain.planner import report
from pretrain.planner.hardware import load_hardware
from pretrain.planner.planned_run import load_planned
from pretrain.planner.uncertainty import uncertainty, with_range

H100 = load_hardware("h100")


def test_a_range_is_given_where_something_alike_was_measured():
    transformer = uncertainty(load_planned("410m/transformer", []), H100)
    hybrid = uncertainty(load_planned("410m/gdn-hybrid-3to1", []), H100)
    assert transformer.factor is not None and hybrid.factor is not None
    assert 1 < transformer.factor < hybrid.factor
    assert with_range(1000.0, transformer).startswith("1,000 (")
    low, high = transformer.low(1.0), transformer.high(1.0)
    assert low is not None and high is not None and low * high == pytest.approx(1)


@pytest.mark.parametrize(
    ("model", "overrides", "hardware", "words"),
    [
        ("410m/para-gru", [], "h100", "para_gru"),
        ("410m/transformer", [], "cpu", "CPU"),
        ("410m/transformer", ["train.precision=float32"], "h100", "float32"),
    ],
)
def test_what_has_no_measured_relative_says_so(model, overrides, hardware, words):
    found = uncertainty(load_planned(model, overrides), load_hardware(hardware))
    assert found.factor is None and words in found.why
    assert with_range(1000.0, found) == "1,000"


def test_mixers_are_known_by_what_they_are_whatever_a_pattern_calls_them():
    config = load_planned("410m/gdn-hybrid-3to1", [])
    config.model.mixers["linear"] = {**config.model.mixers.pop("gdn"), "kind": "gdn"}
    config.model.pattern = config.model.pattern.replace("gdn", "linear")
    assert uncertainty(config, H100).factor is not None


def test_a_gpu_of_one_measured_run_has_no_range():
    found = uncertainty(load_planned("410m/transformer", []), load_hardware("b200"))
    assert found.factor is None and "one published run" in found.why


def test_unknown_gpus_have_no_range():
    other = dataclasses.replace(H100, name="MI300X")
    assert "MI300X" in uncertainty(load_planned("410m/transformer", []), other).why


def test_architectures_are_compared_on_one_budget(tmp_path, capsys):
    models = ["410m/transformer", "--compare", "410m/gdn-hybrid-3to1", "410m/para-gru"]
    files = ["--plot", str(tmp_path / "new/plot.png"), "--json", str(tmp_path / "figures.json")]
    assert report.main([*models, "--devices", "8", *files, "train.tokens=1000000000"]) == 0
    shown = capsys.readouterr().out
    assert "1B tokens" in shown and "no published run with para_gru" in shown
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [one["name"] for one in found] == ["transformer", "gdn-hybrid-3to1", "para-gru"]
    tokens = [one["tokens_per_second"] * one["hours"] * 3600 for one in found]
    assert tokens == pytest.approx([tokens[0]] * 3, rel=1e-6)
    assert [one["range_factor"] is None for one in found] == [False, False, True]
    assert (tmp_path / "new/plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_needs_a_comparison(tmp_path):
    with pytest.raises(UserError, match="expected --compare"):
        report.main(["410m/transformer", "--plot", str(tmp_path / "plot.png")])
