"""Options of generated texts: what is not supported is refused, not left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from evals.harness.generation_options import GenerationOptions, generation_options
from evals.harness.model import HarnessModel
from pretrain.common.errors import UserError

pytestmark = pytest.mark.usefixtures("processes")
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.7}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, GenerationOptions([], 256, 0.0, None, None)),
        ({"until": "a", "max_new_tokens": 3}, GenerationOptions(["a"], 3, 0.0, None, None)),
        ({"until": ["", "b"], "temperature": 0.5}, GenerationOptions(["b"], 256, 0.5, None, None)),
        ({"do_sample": False, "temperature": 2.0}, GenerationOptions([], 256, 0.0, None, None)),
        ({"do_sample": True}, GenerationOptions([], 256, 1.0, None, None)),
        ({**SAMPLED, "top_k": 0}, GenerationOptions([], 256, 0.7, None, None)),
        ({**SAMPLED, "top_k": 5, "top_p": 1}, GenerationOptions([], 256, 0.7, 5, 1)),
        # Greedy texts do not depend on these.
        ({"do_sample": False, "top_p": 0}, GenerationOptions([], 256, 0.0, None, None)),
        (
            {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "min_p": None},
            GenerationOptions([], 256, 0.0, None, None),
        ),
    ],
)
def test_supported_options(given, expected):
    assert generation_options("task 'x'", given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "task 'x' sets num_beams to 4 .* not supported.*supported are until"),
        ({"repetition_penalty": 1.1}, "sets repetition_penalty to 1.1"),
        ({"no_repeat_ngram_size": 3}, "sets no_repeat_ngram_size to 3"),
        ({"something": True}, "sets something to True"),
        ({**SAMPLED, "top_p": 0}, "sets top_p to 0 .* expected above 0 and at most 1"),
        ({**SAMPLED, "top_p": 1.5}, "sets top_p to 1.5"),
        ({**SAMPLED, "top_p": "0.9"}, "sets top_p to '0.9'"),
        ({**SAMPLED, "top_k": -1}, "sets top_k to -1 .* expected a whole number from 1"),
        ({**SAMPLED, "top_k": 2.5}, "sets top_k to 2.5"),
        ({"do_sample": True, "temperature": -1}, "sets temperature to -1.0"),
        ({"temperature": "hot"}, "task 'x': generation_kwargs .* could not convert"),
        ({"max_gen_toks": 0}, "sets max_gen_toks to 0 .* expected at least 1"),
    ],
)
def test_others_are_refused_before_and_while_texts_are_made(given, message):
    with pytest.raises(UserError, match=message):
        generation_options("task 'x'", given)
    task: Any = SimpleNamespace(
        OUTPUT_TYPE="generate_until", config=SimpleNamespace(generation_kwargs=given)
    )
    unused: Any = SimpleNamespace(eod_id=0)
    model = HarnessModel(unused, unused, 1000)
    with pytest.raises(UserError, match=message):
        model.check_task("x", task, sampled=True)
    with pytest.raises(UserError, match="generation_kwargs"):
        model.generate_until([Instance("generate_until", {}, ("a", given), 0)])
