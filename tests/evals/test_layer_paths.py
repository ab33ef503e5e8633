"""The search over layer paths, and the controls that tell luck from a finding."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from evals.layer_paths.command import find_paths, show
from evals.layer_paths.controls import Trials, judge, noise
from evals.layer_paths.questions import divergence, probabilities
from evals.layer_paths.search import search_paths
from evals.layer_paths.space import edited, random_paths
from pretrain.common.errors import UserError
from pretrain.inference.score import Pair, StateScorer
from tests.helpers.small_model import VOCAB, make

pytestmark = pytest.mark.usefixtures("processes")


def test_edits_leave_out_or_repeat_neighbours():
    draw, seen = random.Random(0), set()
    for _ in range(2000):
        path = edited((0, 1, 2, 3), draw, 8)
        assert 1 <= len(path) <= 8
        seen.add(path)
    assert {(0, 1, 2), (0, 3), (0, 1, 1, 2, 3), (0, 1, 2, 1, 2, 3), (3,)} <= seen
    assert (0, 2, 1, 3) not in seen


def test_the_search_finds_what_is_planted():
    """Blocks 3, 7 and 9 are to be left out and 5 repeated, which takes four edits."""
    counts = [0 if i in (3, 7, 9) else 2 if i == 5 else 1 for i in range(12)]

    def reward(path):
        asked.append(path)
        return sum(path.count(i) == count for i, count in enumerate(counts)) / 12

    identity, best, drawn = tuple(range(12)), [], []
    for seed in range(5):
        asked: list[tuple[int, ...]] = []
        found = search_paths(identity, reward, evaluations=300, seed=seed)
        assert len(asked) == len(set(asked)) == len(found)
        lengths = [len(path) for path in found]
        others = random_paths(lengths, identity, random.Random(seed), lambda _: True)
        assert sorted(len(path) for path in others) == sorted(lengths)
        best.append(max(found.values()))
        drawn.append(max(reward(path) for path in others))
    # Nearer than as many random paths of the same lengths come.
    assert np.mean(best) > np.mean(drawn) + 0.04


def trials_that_guess(count, gold, choices, seed):
    draw = np.random.default_rng(seed)
    return Trials(
        [str(i) for i in range(count)],
        [draw.normal(size=(len(gold), choices)) for _ in range(count)],
    )


@pytest.mark.parametrize("choices", [2, 4])
def test_guesses_mend_nearly_everything_and_nothing_beyond_luck(choices):
    draw = np.random.default_rng(0)
    gold = draw.integers(choices, size=400)
    unchanged = draw.normal(size=(400, choices))
    searched = np.arange(400) < 200
    trials = trials_that_guess(30, gold, choices, seed=3)
    found = judge(trials, unchanged, gold, [choices] * 400, searched)
    assert found.found_wrong is not None and min(found.found, found.found_wrong) > 0.99
    assert found.beyond_luck_interval is not None
    assert found.beyond_luck_interval[0] <= 0 <= found.beyond_luck_interval[1]
    assert found.searched > found.held_out  # it was chosen by luck
    assert found.gain_interval[0] < 0


def test_a_trial_that_is_better_is_told_from_luck():
    draw = np.random.default_rng(1)
    gold = draw.integers(4, size=300)
    unchanged = draw.normal(size=(300, 4))
    good = draw.normal(size=(300, 4))
    good[np.arange(300), gold] += 2
    trials = Trials(["bad", "good"], [unchanged, good])
    found = judge(trials, unchanged, gold, [4] * 300, np.arange(300) % 2 == 0)
    assert found.chosen == "good"
    assert found.gain_interval[0] > 0.2
    assert found.beyond_luck_interval is not None and found.beyond_luck_interval[0] > 0.2


def test_noise_is_taken_out_again_and_grows_with_its_scale():
    model = make().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.arange(12)[None]
    plain, moved = model(tokens), []
    for scale in (0.01, 0.1):
        with noise(model, scale, seed=1):
            moved.append((model(tokens) - plain).abs().max().item())
    assert 0 < moved[0] < moved[1]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_shares_and_their_divergence():
    scores = np.array([[0.0, np.log(3), -np.inf], [1.0, 1.0, 1.0]])
    shares = probabilities(scores)
    np.testing.assert_allclose(shares, [[0.25, 0.75, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert divergence(scores, scores) == 0
    other = np.array([[0.0, 0.0, -np.inf], [1.0, 1.0, 1.0]])
    expected = (0.25 * np.log(0.5) + 0.75 * np.log(1.5)) / 2
    assert divergence(scores, other) == pytest.approx(expected)


class Invented:
    """Questions of random tokens: what a task is to the search."""

    def __init__(self, model, count=16, choices=3):
        draw = random.Random(0)
        self.model, self.num_choices = model, [choices] * count
        self.gold = np.array([draw.randrange(choices) for _ in range(count)])
        self.pairs = [
            Pair([draw.randrange(VOCAB) for _ in range(6)], [draw.randrange(VOCAB)])
            for _ in range(count * choices)
        ]

    def __len__(self):
        return len(self.gold)

    def scores(self, *, prior):
        assert prior
        values = StateScorer(self.model, VOCAB).log_likelihoods(self.pairs)
        return np.array([value for value, _ in values]).reshape(len(self), -1)


def test_a_search_with_its_controls_leaves_the_model_as_it_was(capsys):
    model = make().eval()
    tokens = torch.arange(12)[None]
    plain = model(tokens)
    result = find_paths(model, Invented(model), evaluations=12, seed=1)
    assert torch.equal(model(tokens), plain) and model.layer_path is None
    assert result["evaluations"] == 12 and result["searched_on"] == 8
    assert set(result["kinds"]) == {"search", "random paths", "noise in weights"}
    assert result == find_paths(model, Invented(model), evaluations=12, seed=1)
    lengths = [row["blocks"] for row in result["front"]]
    assert lengths == sorted(lengths)
    json.dumps(result)
    show({"task": "invented", **result})
    shown = capsys.readouterr().out
    assert "16 questions, 8 to search on; 12 trials of each kind; 4 blocks" in shown
    assert "noise in weights" in shown


def test_tasks_that_cannot_be_searched_are_refused(corpus):
    pytest.importorskip("lm_eval")
    from evals.harness.checkpoint_evaluation import harness_model
    from evals.layer_paths.questions import Questions
    from evals.tasks import local_data
    from tests.helpers.loaded_model import loaded

    try:
        local_data.package_directory()
    except UserError as error:
        pytest.skip(str(error))
    one = loaded(corpus, seq_len=512)
    one.candidates = one.tokenizer.vocab_size
    one.imported = None
    model = harness_model(one, max_length=512)
    with pytest.raises(UserError, match="'lambada_openai' is no multiple-choice task"):
        Questions(model, "lambada_openai", 10)
    with pytest.raises(UserError, match="has 4 questions here, expected at least 8"):
        Questions(model, "piqa", 4)
    questions = Questions(model, "arc_easy", 12)
    scores = questions.scores()
    assert scores.shape[0] == 12 and len(questions.gold) == 12
    assert not np.allclose(scores, questions.scores(prior=False))
    for row, choices in zip(scores, questions.num_choices, strict=True):
        assert np.isfinite(row[:choices]).all() and np.isneginf(row[choices:]).all()
