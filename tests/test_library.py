"""docs/library.md: every block runs, one after another, and leaves the process as it was."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

import pretrain
from pretrain.common.errors import UserError
from tests.helpers.processes import ENVIRONMENT, ROOT

SMALL_RUN = ROOT / "tests/data/run-v1/runs/small"
PAGE = (ROOT / "docs/library.md").read_text()
# Runs the page in a thread, as a notebook's kernel may, and looks at what it leaves behind.
PROGRAM = """
import os, signal, sys, threading, warnings
environment, filters = dict(os.environ), list(warnings.filters)
interrupted = signal.getsignal(signal.SIGINT)  # ignored where a shell runs this in the background
import pretrain
assert "torch" not in sys.modules, "importing the package imports torch"
assert (dict(os.environ), list(warnings.filters)) == (environment, filters)
import torch
patched = torch.cuda.current_device, torch.cuda.synchronize, torch.compile
failed = []
def run():
    names = {}
    try:
        for number, block in enumerate(open("blocks.txt").read().split("#----")):
            exec(compile(block, f"block {number}", "exec"), names)
    except BaseException as error:
        failed.append(error)
        raise
thread = threading.Thread(target=run)
thread.start()
thread.join()
assert not failed
import torch.distributed as dist
assert not dist.is_initialized(), "process groups were left behind"
assert (torch.cuda.current_device, torch.cuda.synchronize, torch.compile) == patched
assert signal.getsignal(signal.SIGINT) is interrupted
print("all blocks ran")
"""


def untyped(value: Any) -> Any:
    """Return what a type checker would refuse."""
    return value


def blocks():
    return re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_every_block_of_the_page_runs(tmp_path, corpus):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(corpus, tmp_path / "data/stdlib")
    assert len(blocks()) >= 8
    assert PAGE.count("```") == 2 * len(blocks())
    (tmp_path / "blocks.txt").write_text("#----".join(blocks()))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "all blocks ran" in lines
    assert "ModelConfig: hidden_size is -3, expected at least 1" in lines
    assert any(line.startswith("completed 3 ") for line in lines)


def test_models_and_layers_have_their_weights():
    model = pretrain.build_model("gdn attn", hidden_size=32, vocab_size=40, seed=3)
    tokens = torch.randint(0, 40, (2, 12))
    assert model(tokens).shape == (2, 12, 40)
    assert model(tokens).isfinite().all()
    assert model.hidden_states(tokens).shape == (2, 12, 32)
    assert len(model.states(tokens)) == 2
    same = pretrain.build_model("gdn attn", hidden_size=32, vocab_size=40, seed=3)
    other = pretrain.build_model("gdn attn", hidden_size=32, vocab_size=40, seed=4)
    assert torch.equal(model(tokens), same(tokens))
    assert not torch.equal(model(tokens), other(tokens))


def test_a_config_and_keywords_go_together():
    config = pretrain.ModelConfig(pattern="attn", hidden_size=32, vocab_size=40)
    model = pretrain.build_model(config, hidden_size=48)
    assert model.model_config.hidden_size == 48
    assert config.hidden_size == 32


def test_hidden_states_and_states_are_those_of_the_logits():
    model = pretrain.build_model("mamba2 attn", hidden_size=32, vocab_size=40, init_std=0.2).eval()
    tokens = torch.randint(0, 40, (2, 12))
    hidden = model.final_norm(model.hidden_states(tokens))
    assert torch.allclose(hidden @ model.embedding.weight.t(), model(tokens), atol=1e-5)
    rest, _ = model.forward_with_state(tokens[:, 8:], model.states(tokens[:, :8]))
    assert torch.allclose(rest, model(tokens)[:, 8:], atol=1e-4)


@pytest.mark.parametrize("name", ["gdn", "m2rnn", "attn", "para_gru"])
def test_a_layer_continues_from_its_state(name):
    layer = pretrain.mixer(name, hidden_size=32, std=0.2)
    x = torch.randn(2, 20, 32)
    y, _ = layer(x)
    first, state = layer(x[:, :11])
    second, _ = layer(x[:, 11:], state=state)
    assert y.isfinite().all() and y.abs().max() > 0
    assert torch.allclose(torch.cat([first, second], 1), y, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pretrain.build_model("attn", hidden_size=32), "vocab_size is not set"),
        (lambda: pretrain.build_model("atn", hidden_size=32, vocab_size=8), "did you mean 'attn'"),
        (
            lambda: pretrain.build_model("attn", hidden_size=-3, vocab_size=8),
            "hidden_size is -3, expected at least 1",
        ),
        (lambda: pretrain.mixer("gdm", hidden_size=32), "unknown mixer 'gdm' .*did you mean 'gdn'"),
        (lambda: pretrain.mixer("gdn", hidden_size=32, heads=2), "unknown setting 'heads'"),
        (lambda: pretrain.mixer("m2rnn", hidden_size=32, kind="gdn"), "unknown setting 'kind'"),
        (lambda: pretrain.mixer("gdn", hidden_size=-3), "^mixer: hidden_size is -3"),
        (lambda: pretrain.mixer("gdn", hidden_size=32, std=-1), "mixer: std is -1"),
        (lambda: pretrain.mixer("gdn", hidden_size=32, seed=untyped("x")), "mixer: seed is 'x'"),
        (lambda: pretrain.mixer(untyped(None), hidden_size=32), "mixer: name is None"),
        (lambda: pretrain.mixer("gdn", hidden_size=32, device="gpu"), "mixer: device is 'gpu'"),
        (lambda: pretrain.load("nowhere", dtype=torch.int32), "load: dtype is torch.int32"),
        (lambda: pretrain.load("nowhere", dtype="zeros"), "load: dtype is 'zeros'"),
        (
            lambda: pretrain.load("hf:nothing", recurrences=2),
            "recurrences is 2, expected none for hf:nothing",
        ),
        (lambda: pretrain.load("nowhere"), "no checkpoint at nowhere"),
        (lambda: pretrain.Run("nowhere"), "nowhere holds no run"),
        (lambda: pretrain.Trainer("nowhere.yaml"), "no config file at nowhere.yaml"),
    ],
)
def test_what_cannot_work_is_one_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_devices_and_dtypes_are_those_asked_for():
    sizes: dict[str, Any] = {"hidden_size": 32, "vocab_size": 40}
    expected = pretrain.build_model("gdn attn", **sizes).embedding.weight
    with torch.device("meta"):
        assert pretrain.build_model("gdn attn", **sizes).embedding.weight.is_meta
        assert pretrain.mixer("gdn", hidden_size=32).mixer.A_log.is_meta
        here = pretrain.build_model("gdn attn", device="cpu", **sizes).embedding.weight
        assert not pretrain.load(SMALL_RUN, device="cpu").model.embedding.weight.is_meta
    assert torch.equal(here, expected)
    for dtype in ("bf16", "bfloat16", torch.bfloat16):
        model = pretrain.build_model("gdn attn", dtype=dtype, **sizes)
        assert model.embedding.weight.dtype == torch.bfloat16
    assert pretrain.load(SMALL_RUN, dtype="bf16").model.embedding.weight.dtype == torch.bfloat16


def test_requests_of_a_trained_model_are_checked():
    loaded = pretrain.load(SMALL_RUN)
    texts = ["return x", "", "x"]
    alone = [*loaded.score(texts[:1]), 0.0, *loaded.score(texts[2:])]
    assert loaded.score(texts) == pytest.approx(alone, rel=1e-5)
    assert loaded.score([""]) == [0.0]
    assert loaded.score([]) == []
    with pytest.raises(UserError, match="texts is the string 'return x', expected a list"):
        loaded.score("return x")
    with pytest.raises(UserError, match="texts holds None, expected strings"):
        loaded.score([untyped(None)])
    with pytest.raises(UserError, match="max_tokens is -1, expected at least 0"):
        loaded.generate("def ", max_tokens=-1)
    with pytest.raises(UserError, match="top_p is 2, expected above 0 and at most 1"):
        loaded.generate("def ", temperature=1.0, top_p=2)
    assert loaded.generate("def ", max_tokens=0) == "def "
    with pytest.raises(UserError, match=r"recurrences is 3, but the model of .* has no loop"):
        pretrain.load(SMALL_RUN, recurrences=3)


def test_names_are_those_of_the_page():
    used = set(re.findall(r"\bpretrain\.([A-Za-z_]+)", "".join(blocks())))
    assert used - {"training"} <= set(pretrain.__all__)
    for name in pretrain.__all__:
        assert getattr(pretrain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pretrain.nothing


EXPERTS = """
import sys, warnings
warnings.simplefilter("error")
import torch, pretrain
moe = {"num_experts": 4, "top_k": 2, "intermediate_size": 8, "bias_update_rate": 0.1}
sizes = {"hidden_size": 16, "vocab_size": 40}
model = pretrain.build_model("attn", moe={**moe, "capacity_factor": 1.0}, **sizes)
model(torch.zeros(2, 8, dtype=torch.long)).sum().backward()
model.update_biases()
assert model.blocks[0].mlp.bias.abs().max() > 0
"""


def test_experts_need_no_process_groups_and_warn_of_nothing():
    done = subprocess.run(
        [sys.executable, "-c", EXPERTS],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_model_of_hugging_face_answers_likewise(tmp_path):
    """One of ours, exported: both ways of loading it agree."""
    pytest.importorskip("transformers")
    from pretrain.export.hugging_face import export_command

    export_command([str(SMALL_RUN), str(tmp_path / "exported")])
    ours: Any = pretrain.load(SMALL_RUN)
    theirs = pretrain.load(f"hf:{tmp_path / 'exported'}", trust_remote_code=True)
    texts = ["def function_3(x, y):", "return x"]
    assert theirs.score([""]) == [0.0]
    # Among the tokens that there are; ours counts the embedding's other rows too.
    expected = []
    for text in texts:
        ids = torch.tensor([ours.opening_id, *ours.tokenizer.encode(text)])
        with torch.no_grad():
            logits = ours.model(ids[None])[0, :-1, : ours.tokenizer.vocab_size]
        expected.append(float(logits.log_softmax(-1).gather(1, ids[1:, None]).sum()))
    assert theirs.score(texts) == pytest.approx(expected, rel=1e-4)
    assert all(a > b for a, b in zip(expected, ours.score(texts), strict=True))
    assert theirs.generate("def ", max_tokens=8) == ours.generate("def ", max_tokens=8)
