"""The report: what it says of runs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evals.report.figures import draw_losses
from evals.report.groups import grouped
from evals.report.laws import scaling_sets
from evals.report.page import main
from evals.report.runs import find_runs, matches_of
from evals.report.scores import score_names
from evals.report.tables import make_tables, shared
from evals.scaling import Curve
from tests.helpers.report_runs import ARMS, arms_of_a_grid, grid_of_seeds, rows
from tests.helpers.scaling_runs import run_directory


@pytest.fixture
def runs(tmp_path):
    return grid_of_seeds(tmp_path)


def test_seeds_are_one_row_with_their_spread(runs):
    found, told = find_runs([runs])
    groups = grouped(found)
    assert [len(g.runs) for g in groups] == [1, 3, 1]
    assert [g.label for g in groups] == ["lr=0.003", "lr=0.001", "lr=0.0001"]
    low = groups[1]
    mean, spread = low.mean([r.final for r in low.runs]) or (None, None)
    last = np.mean([3 * s**-0.5 for s in range(180, 201, 5)])
    assert mean == pytest.approx(3.02 + last)
    assert spread == pytest.approx(0.02)
    assert low.runs[0].best == pytest.approx(low.runs[0].final)
    (score,) = groups[0].runs[0].scores
    assert (score.task, score.metric, score.value) == ("perplexity", "bits_per_byte", 1.25)
    assert groups[2].runs[0].state == "step 50 of 200"
    assert groups[2].mean([None, 1.0]) is None
    assert matches_of([runs]) == ["grid: members are matched in flops"]
    assert not told


def test_a_resumed_run_counts_each_step_once_and_its_time_on(tmp_path):
    before, after = rows(3.0, 100)[:-1], rows(2.9, 200)[15:-1]
    for row in after:
        row["seconds"] -= 40  # the clock begins anew with step 80
    directory = run_directory(tmp_path, before + after)
    (run,), _ = find_runs([directory])
    assert len(run.steps) == len(set(run.steps)) == 40
    assert run.loss[15] == pytest.approx(2.9 + 3 * 80**-0.5)
    assert (np.diff(run.seconds) >= 0).all()


def test_a_branch_says_what_it_goes_on_from(tmp_path):
    run_directory(tmp_path, rows(3.0), "trunk")
    section = {"run": "runs/trunk", "step": 100}
    branch = run_directory(tmp_path, rows(2.9), "decayed", branch=section)
    parent = {"run": "runs/trunk", "step": 100, "tokens": 12800}
    (branch / "parent.json").write_text(json.dumps(parent))
    found, notes = find_runs([tmp_path])
    assert len(grouped(found)) == 2
    assert any("decayed is a branch of runs/trunk, step 100 (12,800 tokens)" in n for n in notes)


def test_borders_of_phases_are_noted(tmp_path):
    marks = [
        {"step": 0, "tokens": 0, "phase_begins": 1, "phase_name": "short"},
        {"step": 120, "tokens": 120 * 128, "phase_begins": 2, "phase_name": "decay"},
    ]
    directory = run_directory(tmp_path, sorted([*rows(3.0), *marks], key=lambda r: r["step"]))
    found, told = find_runs([directory])
    assert found[0].borders == [(120.0, 120 * 128.0, "decay")]
    assert told == ["phases of run (dotted in the curves): decay after 15,360 tokens"]
    assert draw_losses(grouped(found), "tokens", tmp_path / "losses.png")


def test_losses_are_means_over_steps_and_speeds_of_the_run(tmp_path):
    lines = rows(3.0)
    for row in lines[:-1]:
        row["loss_mean"] = row["loss"] + 0.5
    (run,), _ = find_runs([run_directory(tmp_path, lines)])
    assert run.loss == pytest.approx([row["loss"] + 0.5 for row in lines[:-1]])
    seconds = sum(5 * 128 / row["tokens_per_second"] for row in lines[:-1])
    assert run.tokens_per_second == pytest.approx(200 * 128 / seconds)


def test_a_run_counts_once_however_it_is_named(runs, tmp_path):
    (runs / "linked").symlink_to(run_directory(tmp_path, rows(3.1), "elsewhere"))
    (tmp_path / "link-to-grid").symlink_to(runs)
    names = {"low-0", "low-1", "low-2", "high", "short", "linked"}
    for words in (
        [runs],
        [runs, runs / "low-0"],
        [runs / "low-0", runs],
        sorted(runs.iterdir()),
        [runs / "*", tmp_path / "link-to-grid", tmp_path / "elsewhere"],
    ):
        found, notes = find_runs(words)
        assert len(found) == 6, words
        assert {run.name for run in found} in (names, names - {"linked"} | {"elsewhere"})
        assert not [note for note in notes if "grid.json" in note]
    assert matches_of([runs, runs / "low-0", tmp_path / "link-to-grid"]) == [
        "grid: members are matched in flops"
    ]


def test_scores_of_other_settings_stand_apart(tmp_path):
    """Three runs: a full score, one of 3 documents, and one with examples."""
    full = {"task": "t", "step": 200, "documents": 100, "documents_of_task": 100, "limit": None}
    results = [
        {**full, "scores": {"acc": 0.5}},
        {**full, "scores": {"acc": 0.9}, "limit": 3, "documents": 3},
        {**full, "scores": {"acc": 0.7}, "limit": 500},  # which limits nothing
    ]
    for number, result in enumerate(results):
        directory = run_directory(tmp_path, rows(3.0), f"r{number}", optimizer={"lr": 0.1 + number})
        (directory / "evals").mkdir()
        (directory / "evals/t.json").write_text(json.dumps(result))
    found, _ = find_runs([tmp_path])
    scores = [score for run in found for score in run.scores]
    names = score_names(scores)
    assert [names[score.kind] for score in scores] == ["t acc", "t acc (only 3 documents)", "t acc"]
    few = {**full, "scores": {"acc": 0.8}, "num_fewshot": 5, "chance": {"acc": 0.25}}
    (tmp_path / "r2/evals/few.json").write_text(json.dumps(few))
    scores = [score for run in find_runs([tmp_path])[0] for score in run.scores]
    listed = sorted(score_names(scores).values())
    assert listed == [
        "t acc (num fewshot 5; chance 0.2500)",
        "t acc (num fewshot None)",
        "t acc (only 3 documents; num fewshot None)",
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"mlp": {"intermediate_size": None}}, {"mlp": {"intermediate_size": 32}}),
        ({"mlp": {"ratio": 4, "multiple_of": 8}}, {"mlp": {"ratio": 3.9, "multiple_of": 32}}),
        ({"pattern": "2*(attn gdn)"}, {"pattern": "attn gdn attn gdn"}),
        ({"vocab_size": None}, {"vocab_size": 64}),
        ({"mixers": {"attn": {"num_heads": 2}}}, {"mixers": {"attn": {"num_heads": 2}, "gdn": {}}}),
    ],
)
def test_seeds_of_one_model_are_one_row_however_it_is_written(one, other, tmp_path):
    mixers = {"attn": {"num_heads": 2}, "gdn": {"num_heads": 1, "head_dim": 4}}
    base: dict[str, Any] = {"hidden_size": 8, "pattern": "attn", "mixers": mixers}
    for seed, model in enumerate((one, other, one)):
        run_directory(tmp_path, rows(3.0), f"s{seed}", seed=seed, model={**base, **model})
    (group,) = grouped(find_runs([tmp_path])[0])
    assert len(group.runs) == 3


def test_seeds_of_one_budget_are_one_row(tmp_path):
    train = {"seq_len": 16, "global_batch_tokens": 128}
    budgets = ({"steps": 200}, {"tokens": 200 * 128}, {"tokens": 200 * 128 - 5})
    for seed, budget in enumerate(budgets):
        run_directory(tmp_path, rows(3.0), f"s{seed}", seed=seed, train={**train, **budget})
    assert len(grouped(find_runs([tmp_path])[0])) == 1


def test_models_that_differ_stay_apart(tmp_path):
    """A section that one lacks tells them apart, without a column for each of its settings."""
    base = {"hidden_size": 8, "mixers": {"attn": {"num_heads": 2}}}
    models = [
        {**base, "pattern": "attn"},
        {**base, "pattern": "attn", "moe": {"num_experts": 2}},
        {**base, "pattern": "attn attn"},
        {**base, "pattern": "attn", "recursion": {"times": 2}},
    ]
    for number, model in enumerate(models):
        run_directory(tmp_path, rows(3.0 + number), f"m{number}", model=model)
    groups = grouped(find_runs([tmp_path])[0])
    assert [group.label for group in groups] == [
        "moe=no, pattern=attn, recursion=no",
        "moe=yes, pattern=attn, recursion=no",
        "moe=no, pattern=attn attn, recursion=no",
        "moe=no, pattern=attn, recursion=yes",
    ]


@pytest.mark.parametrize("labels", [True, False])
def test_a_grids_labels_name_its_arms(labels, tmp_path):
    folder = arms_of_a_grid(tmp_path / "grid", seeds=2, labels=labels)
    groups = grouped(find_runs([folder])[0])
    assert [(g.label, len(g.runs)) for g in groups] == [("attn", 2), ("hybrid", 2), ("gru", 2)]
    assert [g.differing for g in groups] == [{"pattern": arm} for arm in ARMS]
    assert [g.others["intermediate_size"] for g in groups] == [40, 32, 24]
    results, *_, others = make_tables(groups)
    names = [column["name"] for column in results["columns"]]
    assert names[:3] == ["run", "pattern", "final loss"]
    below = [column["name"] for column in others["columns"]]
    assert below == ["run", "intermediate_size", "pattern"]
    assert groups[1].others["pattern"] == "gru attn"
    assert {"name": "model.hidden_size", "value": "8"} in shared(groups)


def test_labels_that_do_not_tell_arms_apart_are_not_trusted(tmp_path):
    """Runs of no grid beside it; two grids that call different patterns the same."""
    folder = arms_of_a_grid(tmp_path / "grid")
    model = {"hidden_size": 8, "pattern": "3*attn", "mixers": {"attn": {"num_heads": 2}}}
    run_directory(tmp_path, rows(2.0), "alone", model=model)
    labels = [group.label for group in grouped(find_runs([tmp_path])[0])]
    assert labels[0].endswith("pattern=3*attn") and len(set(labels)) == 4
    (tmp_path / "alone/config.yaml").unlink()
    grid = json.loads((folder / "grid.json").read_text())
    for noted in grid["labels"].values():
        noted["model.pattern"] = "same"
    (folder / "grid.json").write_text(json.dumps(grid))
    labels = [group.label for group in grouped(find_runs([tmp_path])[0])]
    assert labels[0] == "intermediate_size=40, pattern=2*attn"


def test_axes_that_follow_from_others_are_told_apart_from_the_names(tmp_path):
    """Rates that go with the pattern are a column of their own, and sort as numbers."""
    folder = arms_of_a_grid(tmp_path / "grid")
    grid = json.loads((folder / "grid.json").read_text())
    for number, (name, noted) in enumerate(grid["labels"].items(), 1):
        noted["optimizer.lr"] = f"{number}e-3"
        config = folder / name / "config.yaml"
        config.write_text(config.read_text().replace("lr: 0.001", f"lr: {0.001 * number}"))
    (folder / "grid.json").write_text(json.dumps(grid))
    groups = grouped(find_runs([folder])[0])
    assert [g.label for g in groups] == list(ARMS)
    assert [g.others["lr"] for g in groups] == pytest.approx([0.001, 0.002, 0.003])
    for noted in grid["labels"].values():
        del noted["model.pattern"]
    (folder / "grid.json").write_text(json.dumps(grid))
    groups = grouped(find_runs([folder])[0])
    assert [g.label for g in groups] == ["lr=1e-3", "lr=2e-3", "lr=3e-3"]
    assert "lr" not in groups[0].others, "which the labels are"
    assert [row[1]["sort"] for row in make_tables(groups)[0]["rows"]] == [0.001, 0.002, 0.003]
    assert [g.others["pattern"] for g in groups] == ["2*attn", "gru attn", "2*gru"]


def test_few_settings_name_arms_that_differ_in_many(tmp_path):
    for number in range(4):
        many: dict[str, Any] = {}
        many |= {"optimizer": {"lr": 1e-3 * (number + 1), "weight_decay": 0.1 * number}}
        many |= {"schedule": {"kind": "cosine", "warmup_steps": number}}
        many |= {"train": {"steps": 200 + number, "seq_len": 16, "global_batch_tokens": 128}}
        run_directory(tmp_path, rows(3.0 + number), f"r{number}", **many)
    groups = grouped(find_runs([tmp_path])[0])
    assert len(groups[0].differing) < 4 <= len(groups[0].differing) + len(groups[0].others)
    assert len({group.label for group in groups}) == 4


def test_time_is_told_by_what_it_was_spent_on(tmp_path):
    """Of two starts: 10 s that trained and 10 s that did not, then 30 s and 10 s."""
    lines = rows(3.0)[:-1]
    for number, row in enumerate(lines, 1):
        late = number > 10
        row["time/train"] = (number - 10) * 1.0 if late else number * 1.0
        row["time/start"] = 10.0
    (run,), _ = find_runs([run_directory(tmp_path, lines)])
    assert run.spent == {"train": 40.0, "start": 20.0}
    assert run.goodput == pytest.approx(40 / 60)


def test_schedules_of_one_size_get_a_law(tmp_path):
    for kind in ("cosine", "two_stage"):
        name = rf"_{kind}$\frac{{$"  # which is drawn, too
        run_directory(tmp_path, rows(3.0), name, schedule={"kind": kind, "warmup_steps": 20})
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "nothing determines the memory of the intrinsic law" in page
    assert "95 % interval" in page
    assert "Loss curves of 5,000 parameters" in page


def test_no_law_spans_architectures():
    steps, lr = np.arange(1, 50), np.full(50, 1e-3)

    def curve(pattern: str, hidden: int) -> Curve:
        labels = {"model.pattern": pattern, "model.hidden_size": hidden}
        loss = np.ones(49)
        return Curve(f"{pattern} {hidden}", steps, loss, lr, 1, float(hidden), labels=labels)

    sizes = [curve(f"{n}*(gdn attn)", 64 * n) for n in (1, 2, 3)]
    others = [curve("2*(gru attn)", 128)]
    falling = replace(others[0], lr=np.linspace(1e-3, 0, 50))
    ((what, chosen, sized),) = scaling_sets([*sizes, *others])
    assert (what, chosen, sized) == ("of 1*(gdn attn), all sizes", sizes, True)
    (_, (what, chosen, sized)) = scaling_sets([*sizes, *others, falling])
    assert (what, chosen, sized) == ("of 2*(gru attn), 128 parameters", [*others, falling], False)


def test_laws_are_only_fitted_where_they_mean_something(tmp_path):
    """No law of learning rates alone, nor of state sizes; the page says why there is none."""
    steps, lr = np.arange(1, 50), np.full(50, 1e-3)

    def curve(dim: int, peak: float) -> Curve:
        labels = {"model.pattern": "gdn", "model.hidden_size": 64, "model.mixers.gdn.head_dim": dim}
        loss = np.ones(49)
        return Curve(f"{dim} {peak}", steps, loss, lr * peak, 1, 100.0 + dim, labels=labels)

    states = [curve(dim, 1.0) for dim in (8, 16, 32)]
    rates = [curve(8, peak) for peak in (1.0, 2.0, 3.0)]
    assert scaling_sets(states) == scaling_sets(rates) == []
    short = replace(rates[0], lr=np.linspace(1e-3, 0, 50))
    ((_, chosen, sized),) = scaling_sets([*rates, short])
    assert (chosen, sized) == ([*rates, short], False)
    folder = arms_of_a_grid(tmp_path / "grid")
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "No law is fitted: these runs are neither" in page
    assert "Loss curves" not in page
