"""The plan of phases: where they begin, their learning rates, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.common.config_loader import ConfigError, build_config
from pretrain.config import RunConfig, check_run_config, learning_rate


def run(phases=(), schedule=None, **train):
    budget = {} if "steps" in train else {"tokens": 6400}
    values = {
        "name": "x",
        "model": {"hidden_size": 8, "pattern": "attn"},
        "data": {"path": "x"},
        "optimizer": {"lr": 1e-3},
        "schedule": schedule or {"kind": "constant", "warmup_steps": 5},
        "train": {"seq_len": 16, "global_batch_tokens": 64, **budget, **train},
        "parallel": {"micro_batch_size": 2},
        "phases": list(phases),
    }
    config = build_config(RunConfig, values, "x.yaml")
    check_run_config(config, "x.yaml")
    return config


def borders(config):
    return [(phase.first, phase.last) for phase in config.plan.phases]


def test_phases_end_at_their_share_of_all_tokens():
    assert borders(run([{"until": 0.57}, {"until": 0.803}, {}])) == [(0, 57), (57, 81), (81, 100)]
    assert borders(run([{"until": 0.57}, {}], steps=100)) == [(0, 57), (57, 100)]
    assert borders(run([{"until_tokens": 640}, {}])) == [(0, 10), (10, 100)]
    # Larger batches make fewer steps of the same tokens.
    grown = run([{"until": 0.5}, {"global_batch_tokens": 128}])
    assert borders(grown) == [(0, 50), (50, 75)]
    assert (grown.plan.num_steps, grown.plan.tokens) == (75, 6400)
    assert [grown.plan.batch_tokens(step) for step in (49, 50)] == [64, 128]
    assert [grown.plan.tokens_before(step) for step in (50, 51, 75)] == [3200, 3328, 6400]
    # A budget in steps is so many, of whatever batches.
    assert borders(run([{"until": 0.5}, {"global_batch_tokens": 128}], steps=75)) == [
        (0, 50),
        (50, 75),
    ]


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from([32, 64, 96, 256])), min_size=1, max_size=4
    ),
    st.sampled_from([{"tokens": 200_000}, {"steps": 997}, {"tokens": 123_457}]),
)
def test_every_step_belongs_to_one_phase_and_tokens_add_up(parts, budget):
    total, done, phases = sum(share for share, _ in parts), 0, []
    for share, batch in parts:
        done += share
        phases.append({"until": done / total if done < total else 1, "global_batch_tokens": batch})
    config = run(phases, **budget)
    plan = config.plan
    assert borders(config)[0][0] == 0
    for before, after in zip(plan.phases, plan.phases[1:], strict=False):
        assert before.last == after.first
    assert sum(phase.tokens for phase in plan.phases) == plan.tokens
    counted = [plan.batch_tokens(step) for step in range(plan.num_steps)]
    assert sum(counted) == plan.tokens
    if "steps" in budget:
        assert plan.num_steps == budget["steps"]
    else:
        assert 0 <= plan.tokens - budget["tokens"] < 256
    for step in (0, 1, plan.num_steps // 2, plan.num_steps):
        assert plan.tokens_before(step) == sum(counted[:step])


def test_the_batch_warmup_of_a_run_counts_in_its_phases():
    config = run([{"until": 0.5}, {}], batch_warmup_steps=20, batch_warmup_start=32)
    assert config.plan.num_steps == config.train.num_steps == 110
    (first, last), _ = borders(config)
    assert config.plan.tokens_before(last) >= 3200 > config.plan.tokens_before(last - 1)
    assert first == 0


def test_the_learning_rate_is_one_function_over_all_phases():
    plan = run(
        [
            {"until": 0.5},
            {"until": 0.6, "seq_len": 16},
            {"until": 0.8, "schedule": {"kind": "linear", "final_ratio": 0.5}},
            {"schedule": {"kind": "cosine", "final_ratio": 0.1, "warmup_steps": 4}, "lr": 2e-3},
        ]
    ).plan
    rates = [plan.learning_rate(step) for step in range(100)]
    assert rates[:5] == [1e-3 * (step + 1) / 5 for step in range(5)]
    assert rates[5:61] == [1e-3] * 56  # a decay begins where its phase does
    assert rates[70] == pytest.approx(0.75e-3)
    assert rates[79] == pytest.approx(1e-3 * (1 - 0.5 * 19 / 20))
    # From half of the peak, where the decay has ended, up to the new one.
    assert rates[80:84] == pytest.approx([0.5e-3 + 1.5e-3 * (i + 1) / 4 for i in range(4)])
    assert rates[84] == 2e-3
    assert rates[99] == pytest.approx(0.2e-3, rel=0.1)


def test_without_schedules_of_their_own_phases_leave_that_of_the_run():
    schedule = {"kind": "wsd", "decay_fraction": 0.4, "warmup_steps": 3}
    config = run([{"until": 0.3}, {}], schedule)
    rates = [config.plan.learning_rate(step) for step in range(100)]
    assert rates == [learning_rate(config.schedule, 1e-3, step, 100) for step in range(100)]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{}, {"until": 1}], r"phases\[0\] has no until and is not the last; expected until or"),
        ([{"until": 0.5}, {"until": 0.4}, {}], r"phases\[1\].until is 0.4, expected an end after"),
        ([{"until": 1.5}], r"phases\[0\].until is 1.5, expected at most 1"),
        ([{"until": 0.5}], r"phases\[0\], the last one, ends at a share of 0.5"),
        ([{"until_tokens": 7000}, {}], r"phases\[0\].until_tokens is 7000, expected an end after"),
        (
            [{"until": 0.5, "until_tokens": 3}, {}],
            r"phases\[0\].until is 0.5 and phases\[0\].until_tokens 3, expected at most one",
        ),
        ([{"until": 0.501}, {"until": 0.505}, {}], r"phases\[1\] has no step: it begins and ends"),
        ([{"until": 0.5, "seq_len": 12}, {}], r"phases\[0\]: train.global_batch_tokens is 64"),
        ([{"until": 0.5, "seq_len": 32, "micro_batch_size": 2}, {"seq_len": 16}], None),
        (
            [{"until": 0.5, "seq_len": 8}, {"seq_len": 12, "global_batch_tokens": 48}],
            r"phases\[0\].seq_len is 8, expected a divisor of the longest seq_len = 12",
        ),
        ([{"lr": 1e-3}], r"phases\[0\].lr is 0.001, the peak of a schedule .*schedule is null"),
        (
            [{"until": 0.5}, {"schedule": {"kind": "wsd", "warmup_steps": 41}}],
            r"phases\[1\].schedule.warmup_steps is 41, but the decay begins after 40 of the 50",
        ),
        (
            [
                {"until": 0.5, "schedule": {"final_ratio": 0}},
                {"schedule": {"kind": "constant"}},
            ],
            r"phases\[1\].schedule begins where the learning rate is 0; expected phases\[1\].lr",
        ),
        ([{"until": 0.5, "name": "a"}, {"name": "a"}], r"phases has a name 'a', expected plain"),
        (
            [{"data": {"blend": [{"path": "y"}], "path": "z"}}],
            r"phases\[0\].data sets blend, and path or weights beside it",
        ),
        ([{"length": 3}], r"unknown setting 'phases\[0\].length'"),
    ],
)
def test_phases_that_do_not_go_together_are_refused(phases, message):
    if message is None:
        run(phases)
        return
    with pytest.raises(ConfigError, match=message):
        run(phases)


def test_settings_that_do_not_go_with_phases_are_refused():
    with pytest.raises(ConfigError, match="until_tokens is 64 in a run whose budget"):
        run([{"until_tokens": 64}, {}], steps=10)
    grown = [{"until": 0.5}, {"global_batch_tokens": 128}]
    with pytest.raises(ConfigError, match="batch_warmup_steps is 4 with phases that set"):
        run(grown, batch_warmup_steps=4, batch_warmup_start=32)
    config = run([{"until": 0.5}, {"seq_len": 32}])
    config.data.packing, config.data.window = "best_fit", 64
    with pytest.raises(ConfigError, match=r"data.window is 64 with data.packing best_fit"):
        check_run_config(config, "x.yaml")
    config = run([{"until": 0.5}, {"schedule": {"kind": "linear"}}], carry_state=True)
    config.data.packing = "best_fit"
    with pytest.raises(ConfigError, match=r"carry_state is true with data.packing best_fit"):
        check_run_config(config, "x.yaml")
    config = run()
    config.data.window = 40
    with pytest.raises(
        ConfigError, match=r"train.seq_len is 16, expected a divisor of data.window"
    ):
        check_run_config(config, "x.yaml")
