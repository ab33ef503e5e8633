"""What stands beside a score: its interval, and what guessing reaches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.metrics import mean_stderr

from evals.harness.scores import chance_level, chance_of_group, leaves_of, score_interval


def wilson(right, count):
    """The interval's formula (Wilson 1927)."""
    z, p = 1.959963984540054, right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return middle - half, middle + half


@pytest.mark.parametrize("count", [2, 3, 10, 57, 1000])
def test_shares_of_right_answers_have_wilsons_interval(count):
    for right in {0, 1, count // 2, count - 1, count}:
        answers = [1.0] * right + [0.0] * (count - right)
        found = score_interval(right / count, mean_stderr(answers), count, averaged=True)
        assert found == pytest.approx(wilson(right, count), abs=1e-6)
        assert found is not None and found[1] - found[0] > 0


def test_one_answer_has_an_interval_too():
    assert score_interval(0.0, None, 1, averaged=True) == pytest.approx(wilson(0, 1), abs=1e-6)


def test_other_means_have_their_standard_error():
    values = np.random.default_rng(0).random(50).tolist()
    score, error = float(np.mean(values)), mean_stderr(values)
    expected = (score - 1.959964 * error, score + 1.959964 * error)
    assert score_interval(score, error, 50, averaged=True) == pytest.approx(expected)
    assert score_interval(3.5, 0.1, 50, averaged=False) == pytest.approx((3.304, 3.696), abs=1e-3)
    # All documents alike, or no standard error: nothing is known of the spread.
    for error in (0.0, None, math.nan):
        assert score_interval(0.5, error, 50, averaged=True) is None
        assert score_interval(0.0, error, 50, averaged=False) is None


def choices_task(sizes, golds=None, kind="multiple_choice"):
    documents = [
        {"choices": ["x"] * size, "gold": gold}
        for size, gold in zip(sizes, golds or [0] * len(sizes), strict=True)
    ]
    task: Any = SimpleNamespace(
        OUTPUT_TYPE=kind,
        doc_iterator=lambda limit: enumerate(documents[:limit]),
        doc_to_choice=lambda document: document["choices"],
        doc_to_target=lambda document: document["gold"],
    )
    return task


def test_chance_is_averaged_over_documents():
    assert chance_level(choices_task([4, 4, 4]), None) == pytest.approx(0.25)
    sizes = [2, 3, 4, 5, 2]
    assert chance_level(choices_task(sizes), None) == pytest.approx(np.mean([1 / n for n in sizes]))
    assert chance_level(choices_task(sizes), 2) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert chance_level(choices_task([4, 4], [[0, 2], [1]]), None) == pytest.approx(0.375)
    assert chance_level(choices_task([4], kind="generate_until"), None) is None


def test_a_group_has_the_chance_of_its_tasks():
    groups = {"all": ["a", "some"], "some": ["b", "c"], "empty": []}
    assert leaves_of("all", groups) == ["a", "b", "c"]
    assert leaves_of("alone", groups) == ["alone"]
    documents = {"a": 10, "b": 30, "c": 60}
    chances = {"a": 0.5, "b": 0.25, "c": 0.2}
    found = chance_of_group("all", groups, chances, documents)
    assert found == pytest.approx(0.1 * 0.5 + 0.3 * 0.25 + 0.6 * 0.2)
    assert chance_of_group("b", groups, chances, documents) == 0.25
    assert chance_of_group("all", groups, {**chances, "c": None}, documents) is None
