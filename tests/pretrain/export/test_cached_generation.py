"""Exported models that go on from a cache, and the code that comes with them."""

from __future__ import annotations

import json

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.export.bundling import bundle, imports, moved_into
from pretrain.export.standalone_model import modeling_source
from pretrain.inference.generate import generate
from pretrain.model.build import build_model
from pretrain.nn.mixers import registry
from tests.helpers.exported_models import built, exported, settings_of, tokens
from tests.helpers.small_model import VOCAB, settings

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("processes")
TOKENS = VOCAB - 5  # of the tokenizer


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """Ours, and the same as transformers loads it, of fewer tokens than rows of the embedding."""
    mixers = {
        **settings().mixers,
        "kda": {"num_heads": 2, "head_dim": 4},
        "swa": {"num_heads": 2, "window": 5},
        "lstm": {"num_heads": 2},
    }
    config = settings(pattern="gdn attn mamba2 kda swa lstm", mixers=mixers)
    model = build_model(config, VOCAB, seed=2).eval()
    folder = tmp_path_factory.mktemp("hybrid")
    theirs, _ = exported(model, folder, TOKENS)
    return model, theirs, folder


def padded():
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :5] = mask[2, :1] = 0
    return {"input_ids": tokens(3, 9) % TOKENS, "attention_mask": mask}


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
    ],
)
def test_beams_and_samples_are_those_without_a_cache(hybrid, options):
    _, theirs, _ = hybrid
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, **options}
        found.append(theirs.generate(**padded(), use_cache=use_cache, **options))
    assert found[0].tolist() == found[1].tolist()
    assert len({tuple(row) for row in found[0].tolist()}) == len(found[0])


def test_texts_are_those_of_our_own_generation(hybrid):
    model, theirs, _ = hybrid
    prompt = (tokens(1, 7) % (TOKENS - 1) + 1)[0].tolist()  # none that pads
    ours = generate(model, prompt, max_tokens=60, temperature=0, seed=0, vocab_size=TOKENS)
    found = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None
    )
    assert found[0].tolist() == [*prompt, *ours]


def test_a_conversation_goes_on_with_the_cache_that_was_returned(hybrid):
    _, theirs, _ = hybrid
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    first = theirs.generate(**padded(), return_dict_in_generate=True, **options)
    cache = first.past_key_values
    assert cache.get_seq_length() == 9 + 5 and cache.is_initialized and cache.batch_size == 3
    longer = torch.cat([first.sequences, tokens(3, 4) % TOKENS], 1)
    mask = torch.cat([padded()["attention_mask"], torch.ones(3, 10, dtype=torch.int64)], 1)
    found = theirs.generate(longer, attention_mask=mask, past_key_values=cache, **options)
    anew = theirs.generate(longer, attention_mask=mask, use_cache=False, **options)
    assert found.tolist() == anew.tolist()
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    with pytest.raises(ValueError, match="cannot go back to an earlier token"):
        cache.crop(3)


@pytest.mark.parametrize("name", ["hybrid", "loop"])
def test_hidden_states_are_those_of_every_block(name, hybrid, tmp_path):
    model = hybrid[0] if name == "hybrid" else built("loop")
    theirs = hybrid[1] if name == "hybrid" else exported(model, tmp_path)[0]
    ids = padded()["input_ids"]
    with torch.no_grad():
        found = theirs(ids, output_hidden_states=True)
        part = theirs(**padded(), output_hidden_states=True).hidden_states
        last = model.final_norm(model.hidden_states(ids))
        head = model.next_logits(model.hidden_states(ids).flatten(0, 1)).view(3, 9, -1)
        assert torch.allclose(
            found.hidden_states[0], model.embedding(ids).transpose(0, 1), atol=1e-6
        )
        alone = theirs(ids[:1, 5:], output_hidden_states=True).hidden_states
    assert len(found.hidden_states) == len(model.blocks_by_state()) + 1
    assert torch.allclose(found.hidden_states[-1], last, atol=1e-6)
    width = TOKENS if name == "hybrid" else VOCAB
    assert torch.allclose(found.logits, head[..., :width], atol=1e-5)
    for one, other in zip(part, alone, strict=True):
        assert torch.allclose(one[0, 5:], other[0], atol=1e-5) and not one[0, :5].any()


def test_only_the_logits_that_are_asked_for_are_computed(hybrid):
    _, theirs, _ = hybrid
    with torch.no_grad():
        whole = theirs(**padded()).logits
        assert torch.equal(theirs(**padded(), logits_to_keep=2).logits, whole[:, -2:])
        some = torch.tensor([4, 8])
        assert torch.allclose(theirs(**padded(), logits_to_keep=some).logits, whole[:, some])
        (logits,) = theirs(**padded(), return_dict=False)
    assert torch.equal(logits, whole)


def test_rows_without_a_token_are_not_generated_and_settings_are_written(hybrid):
    _, theirs, folder = hybrid
    written = json.loads((folder / "generation_config.json").read_text())
    assert written == {"use_cache": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    described = json.loads((folder / "config.json").read_text())
    assert (described["vocab_size"], described["embedding_rows"]) == (TOKENS, VOCAB)
    assert "use_cache" not in described
    assert theirs(tokens(1, 3) % TOKENS).logits.shape == (1, 3, TOKENS)
    assert theirs.config.vocab_size == TOKENS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.tensor([[0, 0], [1, 1]])}, "row 0 of attention_mask is padding"),
        ({"attention_mask": torch.tensor([[1, 1], [1, 0]])}, "row 1 ends in padding, expected"),
        ({"input_ids": None}, "takes input_ids, found inputs_embeds"),
        ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, "found past_key_values"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(changes, message, hybrid):
    _, theirs, _ = hybrid
    with torch.no_grad():
        cache = theirs(tokens(2, 3) % TOKENS, use_cache=True).past_key_values
    arguments = {"input_ids": tokens(2, 2) % TOKENS, "past_key_values": cache, **changes}
    with pytest.raises(ValueError, match=message):
        theirs(**arguments)


def test_the_code_holds_the_layers_that_the_model_has():
    sources = {name: modeling_source(settings_of(name)) for name in ("gdn", "m2rnn", "para_gru")}
    for name, ops in (
        ("gdn", ["delta_rule"]),
        ("m2rnn", ["m2rnn"]),
        ("para_gru", ["para_rnn", "newton"]),
    ):
        text = sources[name]
        assert all(f"_SOURCES['pretrain.ops.{op}.dispatch']" in text for op in ops)
        others = {"delta_rule", "m2rnn", "rat", "rnn"} - set(ops)
        assert not any(f"_SOURCES['pretrain.ops.{op}" in text for op in others)
        for other in ("config.checks", "config.run", "data.batches", "data.tokenizer"):
            assert f"_SOURCES['pretrain.{other}']" not in text
    everything = settings(
        pattern=" ".join(registry()), mixers={name: {} for name in registry()}, hidden_size=64
    )
    assert len(sources["gdn"]) < 0.6 * len(modeling_source(everything))


def test_a_layer_of_somewhere_else_is_refused(monkeypatch):
    monkeypatch.setattr(registry()["gdn"], "__module__", "my_layers.gated")
    with pytest.raises(UserError, match=r"gdn is a layer of my_layers.gated, expected one of"):
        modeling_source(settings())


def test_imports_are_followed_and_moved():
    source = (
        "from pretrain.ops import (\n    rat,\n)\nif TYPE_CHECKING:\n    from pretrain.a import b\n"
        "def f():\n    from pretrain.nn import norm\n"
    )
    assert [node.module for node in imports(source)].count("pretrain.a") == 1
    assert {node.module for node in imports(source, run=True)} == {"pretrain.ops", "pretrain.nn"}
    moved = moved_into("_other", source)
    assert moved.count("from _other.pretrain.") == 3
    for wrong in ("from . import x", "import pretrain.ops"):
        with pytest.raises(ValueError, match="line 1"):
            list(imports(wrong))
    found = bundle([("pretrain.ops", "rat")])
    assert found["pretrain.ops"] == "from pretrain.ops.rat.dispatch import rat\n"
    assert "pretrain.ops.delta_rule" not in found and found["pretrain"] != ""
    with pytest.raises(ValueError, match=r"no module pretrain\.ops\.nothing"):
        bundle([("pretrain.ops", "nothing")])
    with pytest.raises(ValueError, match="numpy is not a module of pretrain"):
        bundle([("numpy", "array")])
