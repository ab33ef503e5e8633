"""RWKV-7's weights by the names of flash-linear-attention, both ways."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.export.families import to_ours, to_theirs
from pretrain.export.families.rwkv7 import RWKV7
from pretrain.model.build import build_model

pytestmark = pytest.mark.usefixtures("processes")
ROWS, EPS = 64, 1e-3
DESCRIBED = {
    "hidden_size": 32,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": ROWS,
    "decay_low_rank_dim": 8,
    "a_low_rank_dim": 4,
    "norm_eps": EPS,
}
FAMILY = RWKV7()


def a_model(seed):
    config = build_config(ModelConfig, FAMILY.model_of(FAMILY.settings(DESCRIBED)), "test")
    model = build_model(config, ROWS, seed=0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return config, model


def test_weights_go_out_and_come_back_as_they_were():
    config, model = a_model(1)
    theirs = dict(to_theirs(FAMILY, config, dict(model.named_parameters())))
    assert theirs["model.layers.1.attn.r_k"].shape == (2, 16)
    assert theirs["model.layers.1.attn.a_lora.lora.0.weight"].shape == (4, 32)
    assert not any("layers.0.attn.v_lora" in name for name in theirs)
    _, back = a_model(2)
    to_ours(FAMILY, back, FAMILY.renamed_weights(theirs, config))
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_the_first_norm_is_taken_into_the_embeddings_and_stacked_mixes_are_divided():
    config, model = a_model(1)
    theirs = dict(to_theirs(FAMILY, config, dict(model.named_parameters())))
    layer = "model.layers.0"
    mixes = [theirs.pop(f"{layer}.attn.x_{name}") for name in "rwkvag"]
    theirs[f"{layer}.attn.x_x"] = torch.cat(mixes).squeeze(1)
    norm = torch.randn(32), torch.randn(32)
    theirs[f"{layer}.pre_norm.weight"], theirs[f"{layer}.pre_norm.bias"] = norm
    _, ours = a_model(2)
    to_ours(FAMILY, ours, FAMILY.renamed_weights(theirs, config))
    for name, parameter in ours.named_parameters():
        expected = model.get_parameter(name)
        if name == "embedding.weight":
            expected = layer_norm(expected, (32,), *norm, eps=EPS)
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"value_dim": 64}, "value_dim is 64, expected its width, 32"),
        ({"norm_bias": False}, "norm_bias is False, expected True"),
        ({"attn": {"layers": [1], "num_heads": 2}}, "attn is .*, expected None"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, expected False"),
    ],
)
def test_what_our_layers_do_not_do_is_refused(described, message):
    with pytest.raises(UserError, match=message):
        FAMILY.model_of(FAMILY.settings({**DESCRIBED, **described}))
