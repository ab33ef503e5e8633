"""Models of other libraries as ours and back: the same logits, states, texts and bits."""

from __future__ import annotations

import json

import pytest
import torch

from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.export.families import FAMILIES, to_ours
from pretrain.export.hugging_face import family_of, write_hugging_face
from pretrain.inference.generate import generate
from pretrain.model.build import build_model
from pretrain.nn.mixers import registry
from tests.helpers.exported_models import settings_of
from tests.helpers.families import (
    CONFIGS,
    VOCAB,
    tiny,
)
from tests.helpers.relative_error import relative_error
from tests.helpers.small_model import settings

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """A model of theirs and the same as ours."""
    theirs = tiny(request.param)
    (family,) = (f for f in FAMILIES if f.model_type == theirs.config.model_type)
    config = build_config(ModelConfig, family.model_of(theirs.config), "import")
    ours = build_model(config, VOCAB, seed=0).eval()
    to_ours(family, ours, theirs.state_dict())
    return family, theirs, ours


def tokens(*shape):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def test_logits_are_theirs(pair):
    _, theirs, ours = pair
    ids = tokens(2, 37)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert relative_error(ours(ids), expected) < 2e-5
        first, states = ours.forward_with_state(ids[:, :21], None)
        second, _ = ours.forward_with_state(ids[:, 21:], states)
    assert relative_error(torch.cat([first, second], 1), expected) < 2e-5


def test_texts_are_theirs(pair):
    _, theirs, ours = pair
    prompt = tokens(1, 9)
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    expected = theirs.generate(prompt, attention_mask=mask, **options)[0, 9:]
    found = generate(
        ours, prompt[0].tolist(), max_tokens=20, temperature=0, seed=0, vocab_size=VOCAB
    )
    assert list(found) == expected.tolist()


def test_an_export_is_their_class_and_comes_back_bit_for_bit(pair, tmp_path):
    family, theirs, ours = pair
    assert family_of(ours.model_config) == (family, "")
    assert write_hugging_face(ours, tmp_path, 128, 0, torch.float32) is None
    assert not list(tmp_path.glob("*.py"))
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["model_type"] == family.model_type
    assert described["architectures"] == [type(theirs).__name__]
    # Not by AutoModel: fla, where another test has imported it, puts its own Mamba-2 there.
    loaded = type(theirs).from_pretrained(tmp_path, use_cache=theirs.config.use_cache).eval()
    weights, expected = loaded.state_dict(), theirs.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    ids = tokens(2, 20)
    with torch.no_grad():
        assert relative_error(loaded(ids).logits, theirs(ids).logits) < 2e-5
    again = build_config(ModelConfig, family.model_of(loaded.config), "import")
    back = build_model(again, VOCAB, seed=1).eval()
    to_ours(family, back, weights)
    with torch.no_grad():
        assert torch.equal(back(ids), ours(ids))


def test_a_wrong_order_is_seen(pair):
    """Two weights of one shape exchanged give other logits: what is random hides nothing."""
    family, theirs, ours = pair
    config = ours.model_config
    other = build_model(config, VOCAB, seed=0).eval()
    to_ours(family, other, theirs.state_dict())
    ids = tokens(1, 20)
    with torch.no_grad():
        expected = ours(ids)
        for weight in family.weights(config):
            if len(weight.ours) < 2 or ".0." not in weight.theirs:
                continue
            named = dict(other.named_parameters())
            one, two = (named[name] for name in weight.ours[:2])
            if one.shape == two.shape:
                one_before, two_before = one.clone(), two.clone()
                one.copy_(two_before), two.copy_(one_before)
                assert relative_error(other(ids), expected) > 1e-3
                one.copy_(one_before), two.copy_(two_before)
        norm = dict(other.named_parameters())["blocks.0.mixer_norm.weight"]
        norm.copy_(norm.flip(0))
        assert relative_error(other(ids), expected) > 1e-3


def test_weights_that_are_missing_wrong_or_of_no_use_are_named(pair):
    family, theirs, ours = pair
    complete = dict(theirs.state_dict())
    name = next(iter(family.weights(ours.model_config))).theirs
    with pytest.raises(UserError, match=rf"{name} is missing, expected \(64, 32\)"):
        to_ours(family, ours, {k: v for k, v in complete.items() if k != name})
    with pytest.raises(UserError, match=rf"{name} is \(3, 32\), expected \(64, 32\)"):
        to_ours(family, ours, {**complete, name: complete[name][:3]})
    with pytest.raises(UserError, match=r"layers.9.more and 1 more: weights that no layer of ours"):
        to_ours(family, ours, {**complete, "layers.9.more": complete[name], "b": complete[name]})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.LlamaConfig(attention_bias=True), "attention_bias is True, expected"),
        (lambda: transformers.LlamaConfig(hidden_act="gelu"), "hidden_act is gelu, expected silu"),
        (
            lambda: transformers.LlamaConfig(
                rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
            ),
            "rope_type is linear, expected default",
        ),
        (
            lambda: transformers.Qwen3Config(use_sliding_window=True, sliding_window=8),
            "use_sliding_window is True, expected False",
        ),
        (
            lambda: transformers.Qwen3MoeConfig(decoder_sparse_step=2),
            "decoder_sparse_step is 2, expected 1",
        ),
        (
            lambda: transformers.Qwen3NextConfig(mlp_only_layers=[1]),
            r"mlp_only_layers is \[1\], expected its first layers alone, or none",
        ),
        (
            lambda: transformers.GraniteMoeHybridConfig(position_embedding_type="alibi"),
            "position_embedding_type is alibi, expected rope or none",
        ),
        (lambda: transformers.Mamba2Config(use_bias=True), "use_bias is True, expected False"),
        (
            lambda: transformers.Mamba2Config(time_step_limit=(0.0, 0.1)),
            r"time_step_limit is \[0.0, 0.1\], expected \[0, inf\]",
        ),
    ],
)
def test_what_our_layers_do_not_do_is_refused(config, message):
    theirs = config()
    (family,) = (f for f in FAMILIES if f.model_type == theirs.model_type)
    with pytest.raises(UserError, match=message):
        family.model_of(theirs)


GATED_ATTENTION = {"num_heads": 3, "qk_norm": True, "output_gate": True}
GATED = {
    "pattern": "gdn attn",
    "mixers": {"attn": GATED_ATTENTION, "gdn": {"norm_eps": 1e-6}},
}
HYBRID = {
    "pattern": "mamba2 attn",
    "mixers": {"attn": {"num_heads": 3, "rotary_dim": 4}},
    "norm_eps": 1e-5,
}
ATTENTION = {"pattern": "2*attn", "mixers": {"attn": {"num_heads": 4}}}
SCALED = {**HYBRID, "mixers": {"attn": {"num_heads": 3, "scale": 0.1}}}
EXPERTS = {"num_experts": 4, "intermediate_size": 16}
SHARED = {**EXPERTS, "shared_intermediate_size": 8}
NORMED = {"num_heads": 4, "qk_norm": True}
WHOLE = {**NORMED, "qk_norm_over": "width"}
OLMO_HYBRID = {"pattern": "gdn attn", "mixers": {"attn": {**WHOLE, "rope_theta": None}}}


@pytest.mark.parametrize(
    ("changes", "family", "reason"),
    [
        (ATTENTION, "llama", ""),
        ({"pattern": "attn", "mixers": {"attn": {"num_heads": 4, "qk_norm": True}}}, "qwen3", ""),
        ({"pattern": "2*mamba2", "mlp": {"kind": "none"}, "norm_eps": 1e-5}, "mamba2", ""),
        ({"pattern": "2*mamba2", "mlp": {"kind": "none"}}, None, "mamba2: norms differ"),
        ({"pattern": "2*mamba2", "norm_eps": 1e-5}, None, r"blocks have an MLP \(swiglu\)"),
        ({"pattern": "attn gdn"}, None, "llama: a block is gdn"),
        ({"pattern": "attn", "mixers": {"attn": WHOLE}, "block_norm": "post"}, "olmo2", ""),
        ({"pattern": "attn", "mixers": {"attn": WHOLE}}, None, "olmo2: block_norm of attn is pre"),
        ({**ATTENTION, "moe": EXPERTS}, "mixtral", ""),
        ({**ATTENTION, "moe": {**EXPERTS, "first_dense": 1}}, None, "first blocks have no experts"),
        ({**ATTENTION, "moe": SHARED}, None, "mixtral: an expert is shared"),
        ({**ATTENTION, "moe": {**EXPERTS, "score": "sigmoid"}}, None, "are scored by a sigmoid"),
        ({"pattern": "attn", "mixers": {"attn": NORMED}, "moe": EXPERTS}, "qwen3_moe", ""),
        ({**GATED, "moe": {**SHARED, "shared_gate": True}}, "qwen3_next", ""),
        ({**GATED, "moe": SHARED}, None, "qwen3_next: the shared expert has no gate"),
        ({**OLMO_HYBRID, "block_norms": {"attn": "post"}}, "olmo_hybrid", ""),
        ({**OLMO_HYBRID, "block_norm": "post"}, None, "olmo_hybrid: block_norm of gdn is post"),
        ({**HYBRID, "residual_scale": 0.5}, None, "granitemoehybrid: a part of a head rotates"),
        ({**SCALED, "logit_scale": 0.25}, "granitemoehybrid", ""),
        ({**SCALED, "moe": SHARED}, "granitemoehybrid", ""),
        ({**SCALED, "moe": EXPERTS}, None, "granitemoehybrid: no expert is shared"),
        ({**ATTENTION, "logit_scale": 0.25}, None, "llama: logit_scale is 0.25"),
        (OLMO_HYBRID, None, "olmo_hybrid: block_norm of attn is pre"),
        (HYBRID, "bamba", ""),
        (GATED, "qwen3_5_text", ""),
        ({"pattern": "2*mlstm", "logit_softcap": 30.0}, "xlstm", ""),
        ({"pattern": "2*mlstm"}, None, "xlstm: logits are not capped"),
        ({**GATED, "pattern": "2*gdn"}, None, "qwen3_5_text: no block is attn"),
        ({**GATED, "mixers": {"attn": GATED_ATTENTION}}, None, "norms differ in norm_eps"),
        ({**HYBRID, "mixers": {"attn": {"num_heads": 3}}}, "granitemoehybrid", ""),
        (
            {**HYBRID, "mixers": {"attn": {"num_heads": 3, "rotary_dim": 2}}},
            None,
            "bamba: another part than half",
        ),
        ({**HYBRID, "pattern": "2*attn"}, None, "llama: a part of a head rotates"),
        ({**ATTENTION, "mixers": {"attn": {"output_gate": True}}}, None, "has an output gate"),
        ({**ATTENTION, "logit_softcap": 3.0}, None, "llama: logits are capped"),
        ({**ATTENTION, "mlp": {"kind": "gelu"}}, None, "llama: the MLP is gelu"),
    ],
)
def test_what_a_model_is_exported_as(changes, family, reason):
    found, why = family_of(settings(**changes))
    assert (found.model_type if found else None) == family
    assert (not why) if found else reason.replace("\\", "") in why


def test_every_other_mixer_comes_with_its_code():
    for name in registry():
        found, why = family_of(settings_of(name))
        assert (found is None) == bool(why)
        assert found is None or name == "mamba2"


def test_their_settings_are_written(tmp_path):
    model = build_model(settings(**ATTENTION), VOCAB, seed=0)
    write_hugging_face(model, tmp_path, 96, 7, torch.bfloat16, 50)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["vocab_size"] == 50 and described["dtype"] == "bfloat16"
    assert described["eos_token_id"] == 7 and described["max_position_embeddings"] == 96
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape == (50, 24)
