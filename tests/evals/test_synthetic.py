"""The generators' answers are right, a small model learns one of them, and bad input is refused."""

from __future__ import annotations

import json
import shlex
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest

from evals.synthetic import __main__ as command
from evals.synthetic.rows import Options, Rows
from evals.synthetic.settings import SyntheticConfig
from evals.synthetic.tasks import (
    MQAR_KEYS,
    TASKS,
    cyclic_table,
    elements_of,
    make_rows,
    permutation_table,
)
from evals.synthetic.training import learning_rate, run, train_length
from pretrain.common.errors import UserError

PERMUTATIONS = list(permutations(range(3)))


def rows_of(task: str, **changes) -> Rows:
    values: dict[str, Any] = {"seed": 3, "stream": "train", "index": 0, "rows": 200, "length": 32}
    return make_rows(task, **(values | changes))


@pytest.mark.parametrize("task", TASKS)
def test_targets_are_what_the_definition_says(task):
    for length in (32, {"addition": 9, "disjointness": 16}.get(task, 8), 64):
        rows = rows_of(task, rows=30, length=length)
        assert rows.scored.any(1).all()
        for tokens, targets, scored in zip(rows.tokens, rows.targets, rows.scored, strict=True):
            assert tokens.min() >= 0 and tokens.max() < TASKS[task].vocab_size
            expected = TASKS[task].solve(tokens.tolist())
            assert np.where(scored, targets, -1).tolist() == expected


@pytest.mark.parametrize(
    ("things", "even", "order"), [(4, False, 24), (5, True, 60), (5, False, 120)]
)
def test_permutations_are_a_group(things, even, order):
    elements = elements_of(things, even=even)
    table = permutation_table(elements)
    assert table.shape == (order, order)
    assert (np.sort(table, 1) == np.arange(order)).all()
    a, b, c = np.random.default_rng(0).integers(0, order, (3, 500))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table != table.T).any()
    swaps = sum(sum(x != i for i, x in enumerate(p)) == 2 for p in elements)
    assert swaps == (0 if even else things * (things - 1) // 2)


def test_s3_is_a_group_that_does_not_commute():
    table = permutation_table(elements_of(3))
    assert np.array_equal(np.sort(table, 0), np.sort(table, 1).T)
    assert (np.sort(table, 1) == np.arange(6)).all()  # closed, and every element has an inverse
    assert (table[0] == np.arange(6)).all() and (table[:, 0] == np.arange(6)).all()
    for a, b, c in product(range(6), repeat=3):
        assert table[table[a, b], c] == table[a, table[b, c]]
    assert (table != table.T).any()


def test_s3_targets_are_composed_permutations():
    rows = rows_of("s3", rows=20)
    for tokens, targets in zip(rows.tokens, rows.targets, strict=True):
        assert tokens[0] == 6
        for end in range(1, len(tokens)):
            things = [0, 1, 2]
            for element in reversed(tokens[1 : end + 1]):  # the last factor acts first
                things = [PERMUTATIONS[element][i] for i in things]
            assert PERMUTATIONS[targets[end]] == tuple(things)


@pytest.mark.parametrize(("task", "modulus"), [("parity", 2), ("modular_addition", 5)])
def test_running_sums(task, modulus):
    rows = rows_of(task)
    assert (rows.tokens[:, 0] == modulus).all()
    assert np.array_equal(rows.targets[:, 1:], np.cumsum(rows.tokens[:, 1:], 1) % modulus)
    assert np.array_equal(cyclic_table(modulus), cyclic_table(modulus).T)


@pytest.mark.parametrize("task", ["s3", "parity", "modular_addition"])
def test_elements_and_targets_are_uniform(task):
    rows = rows_of(task, rows=2000)
    order = round(1 / TASKS[task].chance)
    assert not rows.scored[:, 0].any() and rows.scored[:, 1:].all()
    for values in (rows.tokens[:, 1:], rows.targets[:, 1:], rows.targets[:, -1]):
        shares = np.bincount(values.ravel(), minlength=order) / values.size
        assert len(shares) == order and np.abs(shares - 1 / order).max() < 0.05


@pytest.mark.parametrize(("length", "tokens_per_pair"), [(64, 8), (32, 4), (256, 8), (8, 8)])
def test_mqar_answers_stand_beside_their_keys(length, tokens_per_pair):
    pairs = length // tokens_per_pair
    rows = rows_of("mqar", length=length, options=Options(tokens_per_pair))
    for tokens, targets, scored in zip(rows.tokens, rows.targets, rows.scored, strict=True):
        memory = dict(tokens[: 2 * pairs].reshape(pairs, 2).tolist())
        assert len(memory) == pairs == len(set(memory.values()))
        assert all(1 <= k <= MQAR_KEYS < v <= 2 * MQAR_KEYS for k, v in memory.items())
        assert not scored[: 2 * pairs].any() and sorted(tokens[scored]) == sorted(memory)
        assert [memory[k] for k in tokens[scored]] == targets[scored].tolist()
        assert not tokens[2 * pairs :][~scored[2 * pairs :]].any()  # all else is filler


def test_mqar_values_cannot_be_guessed():
    rows = rows_of("mqar", rows=4000)
    shares = np.bincount(rows.targets[rows.scored])[MQAR_KEYS + 1 :] * TASKS["mqar"].chance
    assert np.allclose(shares / shares.mean(), 1, atol=0.2)


@pytest.mark.parametrize("task", TASKS)
def test_rows_depend_on_the_arguments_alone(task):
    first, again = rows_of(task), rows_of(task)
    assert all(np.array_equal(getattr(first, n), getattr(again, n)) for n in vars(first))
    for change in ({"seed": 4}, {"stream": "test"}, {"index": 1}):
        assert not np.array_equal(first.tokens, rows_of(task, **change).tokens)
    # A long row is unlikely ever to come again: no test row is a training row.
    seen = {row.tobytes() for i in range(5) for row in rows_of(task, index=i).tokens}
    assert not any(row.tobytes() in seen for row in rows_of(task, stream="test", index=32).tokens)


def test_schedules():
    config = SyntheticConfig("gru", "parity", curriculum=[4, 8], steps=300, lr=1.0, warmup=0.1)
    lengths = [train_length(config, step) for step in range(300)]
    assert lengths == [4] * 100 + [8] * 100 + [32] * 100
    rates = [learning_rate(config, step) for step in range(300)]
    assert rates[29] == max(rates) == 1 and rates[0] == pytest.approx(1 / 30)
    assert rates[29:] == sorted(rates[29:], reverse=True) and rates[-1] < 1e-3


@pytest.mark.usefixtures("processes")
def test_a_gru_learns_parity():
    config = SyntheticConfig(
        "gru", "parity", hidden_size=32, length=8, curriculum=[4], steps=250, lr=1e-2
    )
    result = run(config)
    assert result["final_loss"] < 0.1
    assert [score["length"] for score in result["tests"]] == [8, 16, 32]
    assert result["tests"][0]["accuracy"] > 0.95 and result["tests"][0]["rows"] > 0.9
    assert result["tests"][0]["by_position"][0] is None


@pytest.mark.usefixtures("processes")
def test_a_run_can_be_repeated():
    mixers = {"delta_product": {"num_heads": 2, "head_dim": 8}}
    config = SyntheticConfig("delta_product", "s3", mixers, hidden_size=16, steps=3, test_rows=8)
    first, again = run(config), run(config)
    assert first["losses"] == again["losses"] and first["tests"] == again["tests"]


def test_the_command_writes_what_it_shows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "stop_processes", lambda: None)  # other tests need them
    arguments = [
        "mqar",
        "--pattern",
        "deltanet attn",
        "--mixer",
        "deltanet.num_heads=2",
        "--mixer",
        "deltanet.head_dim=8",
        "--mixer",
        "attn.num_heads=2",
        "--hidden-size",
        "16",
        "--length",
        "16",
        "--steps",
        "3",
        "--test-rows",
        "4",
        "--output",
        str(tmp_path),
    ]
    assert command.main(arguments) == 0
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert result["settings"]["mixers"]["attn"] == {"num_heads": 2}
    assert len(result["losses"]) == 3 and result["chance"] == 1 / MQAR_KEYS
    assert str(path) in "".join(capsys.readouterr().out.split())

    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "defaults: {parity: {steps: 2, length: 8, test_rows: 4, hidden_size: 16}}\n"
        "runs: [{task: parity, pattern: gru, seeds: [0, 1]}]\n"
    )
    assert command.main(["--suite", str(suite), "--output", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "### parity, chance 0.500"
    assert lines[4].startswith("| `gru` |") and "| 0 1 |" in lines[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "expected either a task or --suite"),
        ("s9 --pattern gru", "command line: task is 's9'.*expected one of: s3, s4"),
        ("s3", "command line: pattern must be set"),
        ("s3 --pattern grü", "pattern 'grü'"),
        ("s3 --pattern gruu", "unknown mixer 'gruu' .did you mean 'gru'"),
        ("s3 --pattern gru --steps many", "steps is 'many', expected a whole number"),
        ("s3 --pattern gru --lr 0", "lr is 0.0, expected more than 0"),
        ("s3 --pattern gru --curriculum [64]", "curriculum names the length 64, expected 4 to"),
        ("s3 --pattern gru --mixer heads=4", "mixers.gru: unknown setting 'heads'"),
        (
            "s3 --pattern gru --mixer num_heads=3",
            "num_heads is 3, which does not divide hidden_size 64",
        ),
        ("s3 --pattern gru --mixer num_heads", "--mixer is 'num_heads', expected KEY=VALUE"),
        (
            "s3 --pattern 'gru attn' --mixer num_heads=4",
            "expected NAME.KEY=VALUE, such as gru.num_heads=4",
        ),
        ("mqar --pattern gru --length 200", "makes 100 pairs at 4 times the length, expected at"),
        ("mqar --pattern gru --length 33", "a length of mqar is 33, expected an even number"),
        (
            "s3 --pattern gru --recursion '{times: 0}'",
            "command line: recursion.times is 0, expected at least 1",
        ),
        (
            "s3 --pattern gru --test-recurrences [2]",
            r"test_recurrences is \[2\], but there is no recursion",
        ),
        (
            "s3 --pattern gru --recursion '{times: 2, lora_rank: 1}' --test-recurrences [3]",
            "expected numbers from 1 to 2, the passes that the loop has parameters for",
        ),
        (
            "s3 --pattern gru --model-settings '{pattern: attn}'",
            "model_settings has pattern, expected pattern beside it, not in it",
        ),
        ("s3 --pattern gru --mlp relux", "mlp.kind is 'relux'.*expected one of: swiglu, gelu"),
        ("disjointness --pattern gru", "disjointness has rows of 32 to 128 tokens.*expected 16 to"),
        ("--suite nowhere.yaml", "no config file at nowhere.yaml"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        command.main(shlex.split(arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("[{task: s3, pattern: gru, seeds: 3}]", r"runs\[0\]: seeds is 3, expected a list"),
        ("[{task: s3, patern: gru}]", r"runs\[0\]: unknown setting 'patern' .did you mean"),
        ("[{task: s3, pattern: gru, seeds: [-1]}]", "seed is -1, expected at least 0"),
    ],
)
def test_a_bad_suite_is_one_sentence(tmp_path, runs, message):
    path = tmp_path / "suite.yaml"
    path.write_text(f"runs: {runs}\n")
    with pytest.raises(UserError, match=message):
        command.main(["--suite", str(path)])


@pytest.mark.parametrize(("reads", "short_first"), [(1, False), (2, False), (1, True)])
def test_sets_are_read_as_often_and_in_the_order_that_was_asked_for(reads, short_first):
    options = Options(reads=reads, short_first=short_first)
    rows = rows_of("disjointness", length=36, rows=400, options=options)
    assert rows.tokens.shape == (400, 36 + (reads - 1) * 30)
    for tokens, targets, scored in zip(rows.tokens, rows.targets, rows.scored, strict=True):
        expected = TASKS["disjointness"].solve(tokens.tolist())
        assert np.where(scored, targets, -1).tolist() == expected
        first = tokens[1 : tokens.tolist().index(64)]
        assert len(first) == len(set(first)) == (4 if short_first else 24)
    yes = (rows.targets[rows.scored] == 68).mean()
    assert 0.45 < yes < 0.55


def test_windows_of_parity_have_a_question_each():
    rows = rows_of("n_parity", length=20, options=Options(windows=(2, 3, 7)))
    assert (rows.tokens[:, -3:] == [3, 4, 8]).all() and (rows.tokens[:, 1:-3] < 2).all()
    for window, answers in zip((2, 3, 7), rows.targets[:, -3:].T, strict=True):
        assert (answers == rows.tokens[:, 17 - window : 17].sum(1) % 2).all()
        assert 0.3 < answers.mean() < 0.7
