"""Our models behind lm-eval: what opens a request, what is cut, windows, stops, and whole tasks."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from evals.harness.evaluation import evaluate_tasks, random_state_restored
from evals.harness.model import HarnessModel
from pretrain.common.errors import UserError
from pretrain.inference.score import Pair, Scorer, StateScorer
from pretrain.model.build import build_model
from tests.helpers.byte_tokenizer import Letters
from tests.helpers.small_model import settings

pytestmark = pytest.mark.usefixtures("processes")


class Recorder(Scorer):
    """Notes what it is asked; log-likelihood: minus the continuation's length."""

    def __init__(self, text: str = "") -> None:
        self.pairs: list[Pair] = []
        self.prompts: list[Any] = []
        self.text, self.device = list(text.encode()), torch.device("cpu")

    def log_likelihoods(self, pairs):
        self.pairs += pairs
        return [(-float(len(p.continuation)), False) for p in pairs]

    def generate(self, prompts):
        self.prompts += prompts
        made = []
        for prompt in prompts:
            ids: list[int] = []
            for token in self.text:
                ids.append(token)
                if len(ids) == prompt.max_tokens or prompt.done(ids):
                    break
            made.append(ids)
        return made


def harness(scorer=None, max_length=100, **options):
    tokenizer: Any = SimpleNamespace(
        encode=Letters().encode, decode=Letters().decode, eod_id=0, vocab_size=256, sha256="f" * 64
    )
    return HarnessModel(scorer or Recorder(), tokenizer, max_length, **options)


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


def test_a_request_is_opened_as_documents_are():
    model = harness()
    found = model.loglikelihood(requests("loglikelihood", ("ab", " cd"), ("", "xy")))
    assert model.scorer.pairs == [Pair([0, 97, 98], [32, 99, 100]), Pair([0], [120, 121])]
    assert found == [(-3.0, False), (-2.0, False)]
    model = harness(bos="none")
    model.loglikelihood(requests("loglikelihood", ("ab", " cd"), ("", "xy")))
    assert model.scorer.pairs == [Pair([97, 98], [32, 99, 100]), Pair([0], [120, 121])]
    with pytest.raises(UserError, match="--bos is 'some', expected document or none"):
        harness(bos="some")


def test_spaces_belong_to_what_is_scored():
    model = harness()
    model.loglikelihood(requests("loglikelihood", ("ab ", "cd")))
    assert model.scorer.pairs == [Pair([0, 97, 98], [32, 99, 100])]


@pytest.mark.parametrize(("bos", "kept"), [("document", [0, *b"efgh"]), ("none", [*b"defgh"])])
def test_what_is_too_long_loses_its_beginning_and_is_counted(bos, kept):
    model = harness(max_length=6, bos=bos)
    model.loglikelihood(requests("loglikelihood", ("abcdefgh", "xy"), ("ab", "xy")))
    assert model.scorer.pairs[0] == Pair(kept, [*b"xy"])
    assert model.cut == 1
    model.loglikelihood(requests("loglikelihood", ("ab", "0123456789")))
    assert len(model.scorer.pairs[2].continuation) == 6
    assert model.cut == 2


def test_rolling_windows_score_every_token_once():
    model = harness(max_length=4)
    (total,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", ("abcdefghij",)))
    assert total == -10.0
    # lm-eval's own disjoint windows, at least one token of context in each.
    assert [p.continuation for p in model.scorer.pairs] == [[*b"abcd"], [*b"efgh"], [*b"ij"]]
    assert model.scorer.pairs[0].context == [0]
    # The last one is filled up with what came before.
    assert model.scorer.pairs[2].context[-3:] == [*b"fgh"]


def test_a_text_ends_before_its_stop_string():
    model = harness(Recorder("one STOP two"))
    options = {"until": ["STOP", "zzz"], "max_gen_toks": 50}
    assert model.generate_until(requests("generate_until", ("ab", options))) == ["one "]
    (prompt,) = model.scorer.prompts
    assert prompt.ids == [0, 97, 98] and prompt.max_tokens == 50 and prompt.temperature == 0
    assert not prompt.done([*b"one STO"]) and prompt.done([*b"one STOP"]) and prompt.done([97, 0])


def test_a_document_may_end_before():
    scorer = Recorder("ab")
    scorer.text = [97, 0, 98]
    texts = harness(scorer).generate_until(
        requests("generate_until", ("x", {"until": ["q"], "max_gen_toks": 9}))
    )
    assert texts == ["a"]


def test_a_long_prompt_leaves_room_for_its_text():
    model = harness(max_length=10)
    model.generate_until(requests("generate_until", ("abcdefghijkl", {"max_gen_toks": 4})))
    assert model.scorer.prompts[0].ids == [0, *b"hijkl"]
    assert model.cut == 1
    with pytest.raises(UserError, match=r"asks for 10 tokens of text.*give --max-length N"):
        model.generate_until(requests("generate_until", ("a", {"max_gen_toks": 10})))


def test_a_continuation_that_merges_into_its_context_is_scored_with_it(monkeypatch):
    """What is scored is the token that both make, not the context's."""
    model = harness()
    tokens = {"sel": [5], "self": [9], "a sel": [3, 5], "a self": [3, 9], "a selx": [3, 5, 7]}
    monkeypatch.setattr(model, "tok_encode", lambda text, *_, **__: tokens[text])
    assert model._encode_pair("sel", "f") == ([], [9])
    assert model._encode_pair("a sel", "f") == ([3], [9])
    assert model._encode_pair("a sel", "x") == ([3, 5], [7])
    assert model._encode_pair("sel", "") == ([5], [])
    model.loglikelihood(requests("loglikelihood", ("a sel", "f"), ("a sel", "")))
    assert model.scorer.pairs == [Pair([0, 3], [9])]


def test_repeated_samples_differ():
    model = harness(Recorder("a"))
    options = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 1}
    model.generate_until(requests("generate_until", ("a", options), ("a", options)))
    assert [p.seed for p in model.scorer.prompts] == [0, 1]


def test_a_task_that_cannot_run_is_refused_beforehand():
    config = {"max_gen_toks": 40, "do_sample": True, "temperature": 1.0, "until": ["\n"]}
    asked: Any = SimpleNamespace(
        OUTPUT_TYPE="generate_until", config=SimpleNamespace(generation_kwargs=config)
    )
    harness().check_task("x", asked, sampled=True)
    with pytest.raises(UserError, match="task 'x' asks for 40 tokens of text"):
        harness(max_length=40).check_task("x", asked, sampled=True)
    with pytest.raises(UserError, match="task 'x' samples its text at a temperature"):
        harness().check_task("x", asked, sampled=False)


def test_what_lm_eval_refuses_is_one_sentence():
    with pytest.raises(UserError, match="lm-eval refused choices: "):
        evaluate_tasks(harness(), loaded(task()), num_fewshot=9)


def test_sampling_is_the_tasks_choice():
    model = harness(Recorder("a"))
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 1}
    model.generate_until(requests("generate_until", ("a", options)))
    prompt = model.scorer.prompts[0]
    assert (prompt.temperature, prompt.top_p) == (0.7, 0.9)


def task(name="choices", count=30, **changes):
    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        rows = [
            {"question": f"q{i}", "options": ["aa", "b" * (i % 3 + 1)], "gold": i % 2}
            for i in range(count)
        ]
        return {"test": Dataset.from_list(rows), "train": Dataset.from_list(rows[:5])}

    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": load,
            "test_split": "test",
            "fewshot_split": "train",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "{{gold}}",
            "output_type": "multiple_choice",
            "target_delimiter": " ",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            "metadata": {"version": 7},
            **changes,
        }
    )


def loaded(*tasks):
    return {"tasks": {t.task_name: t for t in tasks}, "groups": {}, "group_map": {}}


def test_results_say_what_they_depend_on():
    results = evaluate_tasks(harness(), loaded(task()), limit=12)
    (result,) = results.values()
    # The shorter one is the likelier: right where it is the second and gold, or the longer is not.
    right = [(i % 2 == 1) == (i % 3 + 1 < 2) for i in range(12)]
    assert result["scores"]["acc"] == pytest.approx(np.mean(right))
    assert result["stderr"]["acc"] > 0
    assert (result["version"], result["num_fewshot"], result["documents"]) == (7, 0, 12)
    assert result["limit"] == 12 and result["cut_requests"] == 0


def test_examples_come_before_the_question_alike_every_time():
    prompts = []
    for _ in range(2):
        model = harness()
        evaluate_tasks(model, loaded(task(count=6)), num_fewshot=2)
        prompts.append([bytes(p.context[1:]).decode() for p in model.scorer.pairs])
    assert prompts[0] == prompts[1]
    assert all(p.count("\n\n") == 2 for p in prompts[0])
    with pytest.raises(UserError, match="is defined without examples, but 2 are asked for"):
        evaluate_tasks(harness(), loaded(task(num_fewshot=0)), num_fewshot=2)


def test_random_numbers_stay_as_they_were():
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    for kind in (random.seed, np.random.seed, torch.manual_seed):
        kind(5)
    expected = draws()
    for kind in (random.seed, np.random.seed, torch.manual_seed):
        kind(5)
    with random_state_restored():
        draws()
        evaluate_tasks(harness(), loaded(task()), limit=3)
    assert draws() == expected


def test_a_model_gets_the_same_scores_whatever_the_batch():
    model = build_model(settings(pattern="gdn attn"), 256, seed=0, dtype=torch.float64)
    found = []
    alone: dict[str, Any] = {"tokens_per_pass": 1, "share_prefixes": False}
    for options in ({}, alone):
        lm = harness(StateScorer(model, 256, **options))
        found.append(
            lm.loglikelihood(
                requests(
                    "loglikelihood",
                    *[(f"question {i % 3} and more", f" answer {i}") for i in range(9)],
                )
            )
        )
    for (a, x), (b, y) in zip(*found, strict=True):
        assert math.isclose(a, b, rel_tol=1e-10) and x == y
