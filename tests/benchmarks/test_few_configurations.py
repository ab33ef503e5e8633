"""The autotuner with few configurations, as in a short session on a GPU."""

import pytest

pytest.importorskip("triton")
import triton
from triton.runtime.autotuner import Autotuner

from benchmarks.few_configurations import limit_autotuning, ordinary


def configurations():
    return [
        triton.Config({"BLOCK": block}, num_warps=warps, num_stages=stages)
        for block in (32, 64)
        for warps in (1, 2, 4, 8)
        for stages in (2, 3, 4)
    ]


def test_the_most_ordinary_are_kept_in_their_order():
    kept = [(c.kwargs["BLOCK"], c.num_warps, c.num_stages) for c in ordinary(configurations())]
    assert kept == [(32, 4, 3), (64, 4, 3)]
    few = configurations()[:1]
    assert ordinary(few) == few


def test_a_kernel_made_before_or_after_is_tuned_over_few(monkeypatch):
    monkeypatch.setattr(Autotuner, "prune_configs", Autotuner.prune_configs)

    def tuner():
        return Autotuner(triton.jit(lambda x: None), ["x"], configurations(), ["x"], [], [])

    before = tuner()
    before.nargs = {}
    assert len(before.prune_configs({})) == 24
    limit_autotuning()
    limit_autotuning()
    for each in (before, tuner()):
        each.nargs = {}
        assert len(each.prune_configs({})) == 2


def test_what_the_authors_of_a_kernel_rule_out_is_not_tried(monkeypatch):
    monkeypatch.setattr(Autotuner, "prune_configs", Autotuner.prune_configs)
    limit_autotuning()
    rule = {"early_config_prune": lambda found, _, **__: [c for c in found if c.num_warps == 8]}
    kernel = triton.jit(lambda x: None)
    tuner = Autotuner(kernel, ["x"], configurations(), ["x"], [], [], prune_configs_by=rule)
    tuner.nargs = {}
    assert {c.num_warps for c in tuner.prune_configs({})} == {8}
