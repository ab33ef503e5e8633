"""Generated texts have the answers that reading them gives, and fit their length."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from evals.synthetic import __main__ as command
from evals.synthetic.long_context import LONG_TASKS, make_texts
from evals.synthetic.text_problems import PROBLEMS, make_problems
from evals.tasks.family import TextSettings, parse_name, share_of_answers
from evals.tasks.generated import generated_config
from pretrain.common.errors import UserError


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("task", LONG_TASKS)
@pytest.mark.parametrize("length", [900, 3000])
def test_reading_a_text_gives_its_answers(task, length):
    texts = make_texts(task, count=12, length=length, tokens=words)
    for text in texts:
        assert sorted(LONG_TASKS[task].solve(text.prompt)) == sorted(text.answers)
        assert len(set(text.answers)) == len(text.answers)
        size = words(text.prompt) + LONG_TASKS[task].max_tokens
        assert 0.8 * length < size <= length
    assert len({text.prompt for text in texts}) == len(texts)


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ("niah_single_1", 1),
        ("niah_multivalue", 4),
        ("niah_multiquery", 4),
        ("ruler_vt", 5),
        ("ruler_cwe", 10),
        ("ruler_fwe", 3),
        ("passkey", 1),
    ],
)
def test_as_many_answers_as_ruler_asks_for(task, answers):
    (text,) = make_texts(task, count=1, length=2000, tokens=words)
    assert len(text.answers) == answers


def test_needles_lie_everywhere():
    depths = []
    for text in make_texts("niah_single_1", count=60, length=2000, tokens=words):
        depths.append(text.prompt.index("One of the special") / len(text.prompt))
    assert min(depths) < 0.15 and max(depths) > 0.85
    assert 0.4 < np.mean(depths) < 0.6


@pytest.mark.parametrize("task", ["ruler_cwe", "niah_multikey_2"])
def test_names_are_enough_for_long_texts(task):
    (text,) = make_texts(task, count=1, length=40_000, tokens=words)
    assert sorted(LONG_TASKS[task].solve(text.prompt)) == sorted(text.answers)


def test_variables_are_assigned_before_they_are_used():
    for text in make_texts("ruler_vt", count=20, length=600, tokens=words):
        known = set()
        for name, other in re.findall(r"VAR (\w+) = (?:VAR (\w+)|\d+)", text.prompt):
            assert not other or other in known
            known.add(name)


@pytest.mark.parametrize("task", [*LONG_TASKS, *PROBLEMS])
def test_a_seed_and_a_stream_give_the_same_texts(task):
    def made(**options):
        if task in PROBLEMS:
            return [p.prompt for p in make_problems(task, count=4, length=9, **options)]
        return [t.prompt for t in make_texts(task, count=4, length=900, tokens=words, **options)]

    assert made(seed=1) == made(seed=1)
    assert not set(made(seed=1)) & set(made(seed=2))
    assert not set(made()) & set(made(stream="train"))


def _steps(prompt: str) -> list[list[int]]:
    said = prompt.partition("Steps: ")[2].partition(".")[0]
    return [[int(n) - 1 for n in step.split()] for step in said.split("; ")]


@pytest.mark.parametrize("task", PROBLEMS)
def test_problems_have_the_answers_that_they_say(task):
    for problem in make_problems(task, count=20, length=7):
        prompt, answer = problem.prompt, problem.answer
        if problem.choices:
            assert problem.choices[problem.gold] == answer
            assert len(set(problem.choices)) == len(problem.choices)
        if "cups" in prompt:
            row = list("ABCDE"[: int(prompt[0])])
            for step in _steps(prompt):
                row = [row[i] for i in step]
            assert answer == " ".join(row)
        elif prompt.startswith("Modulo"):
            found = re.fullmatch(r"Modulo (\d+), (.*) =", prompt)
            assert found is not None
            modulus, formula = found.groups()
            assert len(formula.split()) == 13
            assert answer == str(eval(formula) % int(modulus))
        elif task == "text_copying":
            assert answer in prompt and len(answer.split()) == 7
        elif task == "text_induction":
            *before, last = prompt.split()
            assert before[before.index(last) + 1] == answer and before.count(last) == 1
        else:
            told = dict(line.split(": ") for line in prompt.split("\n")[:7])
            assert told[prompt.rpartition("\n")[2].removesuffix(":")] == answer


def test_answers_are_uniform():
    golds = [p.answer for p in make_problems("text_modular_addition", count=400, length=5)]
    assert all(50 < golds.count(str(n)) < 115 for n in range(5))


def test_names_with_lengths():
    assert parse_name("passkey@512") == ("passkey", 512)
    assert parse_name("hellaswag") == ("hellaswag", None)
    with pytest.raises(UserError, match="passkey@LENGTH, such as"):
        parse_name("passkey@long")
    settings = TextSettings(words, 600, count=3)
    assert generated_config("passkey@400", settings)["metadata"]["length"] == 400
    with pytest.raises(UserError, match="requests are cut to 600: give --max-length 900"):
        generated_config("passkey@900", settings)
    training = dataclasses.replace(settings, length_option="eval.max_length=")
    with pytest.raises(UserError, match=r"requests are cut to 600: give eval\.max_length=900"):
        generated_config("passkey@900", training)
    with pytest.raises(UserError, match="the shortest text has"):
        generated_config("ruler_cwe@300", settings)
    with pytest.raises(UserError, match="expected at most 229, the number of words"):
        generated_config("text_mqar@200", settings)


def test_an_answer_counts_by_the_share_that_is_found():
    document = {"answers": ["Red-fox", "blue", "12"]}
    assert share_of_answers(document, [" they are red-fox and BLUE"])["contains"] == 2 / 3


def test_training_texts_are_written(tmp_path, capsys):
    path = tmp_path / "new" / "mqar.jsonl"
    assert command.main(["text", "text_mqar", str(path), "--count", "7", "--length", "4"]) == 0
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    problems = make_problems("text_mqar", count=7, length=4, stream="train")
    assert texts == [f"{p.prompt} {p.answer}" for p in problems]
    assert "7 texts of text_mqar" in capsys.readouterr().out
    command.main(["text", "niah_multiquery", str(path), "--count", "2", "--length", "300"])
    for line in path.read_text().splitlines():
        text = json.loads(line)["text"]
        prompt, _, answers = text.rpartition(" are ")
        assert LONG_TASKS["niah_multiquery"].solve(prompt) == answers.rstrip(".").split(", ")
    with pytest.raises(UserError, match="did you mean text_s5"):
        command.main(["text", "text_s6", str(path)])
    with pytest.raises(UserError, match="--count and --length are expected"):
        command.main(["text", "text_s5", str(path), "--count", "0"])
