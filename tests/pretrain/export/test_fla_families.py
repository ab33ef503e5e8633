"""Models of flash-linear-attention as ours, by their files, against its own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.export.families.fla import HGRN2, GatedDeltaNet, KimiDeltaAttention
from pretrain.export.importing import import_model
from pretrain.inference.load import load_model
from tests.helpers.fla_interpreter import make_interpretable
from tests.helpers.relative_error import relative_error
from tests.helpers.small_llama import make_llama

pytest.importorskip("fla")
pytest.importorskip("transformers")
pytest.importorskip("triton")

pytestmark = [
    pytest.mark.usefixtures("processes"),
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels in Triton's interpreter"),
]
VOCAB = 384
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "intermediate_size": 48,
    "fuse_swiglu": False,
    "fuse_cross_entropy": False,
    "use_cache": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "GatedDeltaNet": {
        "num_heads": 2,
        "num_v_heads": 4,
        "head_dim": 16,
        "expand_v": 1,
        "allow_neg_eigval": True,
    },
    "DeltaNet": {"num_heads": 2, "norm_eps": 1e-5},
    "GLA": {"num_heads": 2, "fuse_norm": False},
    "RetNet": {"num_heads": 2, "tie_word_embeddings": True, "fuse_norm": False},
    "HGRN2": {"expand_ratio": 16, "num_heads": 2},
    "KDA": {"num_heads": 2, "head_dim": 16},
    "HGRN": {"expand_ratio": 2, "use_short_conv": True},
    "RWKV7": {"head_dim": 16},
    # With two kinds of attention.
    "GatedDeltaNet, hybrid": {
        "num_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 3,
        "attn": [
            {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 5},
            {"layers": [2], "num_heads": 2, "rope_theta": 500.0},
        ],
    },
}


def plain_attention(q, k, v, causal, window_size):
    """What flash-attn's function computes, which needs a GPU: q ``[B, T, H, D]``."""
    assert causal and window_size[1] <= 0
    groups, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    behind = torch.arange(length)[:, None] - torch.arange(length)
    seen = behind >= 0
    if window_size[0] >= 0:
        seen &= behind <= window_size[0]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


@pytest.fixture(scope="module", autouse=True)
def interpretable():
    import fla.layers.attn
    import fla.models

    patch = pytest.MonkeyPatch()
    make_interpretable(patch)
    patch.setattr(fla.layers.attn, "flash_attn_func", plain_attention)
    yield
    patch.undo()


@pytest.mark.parametrize("name", KINDS)
def test_a_model_by_its_files_has_the_logits_of_its_class(name, tmp_path):
    import fla.models

    kind, name = {**COMMON, "fuse_norm": False, **KINDS[name]}, name.split(",")[0]
    config = getattr(fla.models, f"{name}Config")(**kind)
    torch.manual_seed(3)
    theirs = getattr(fla.models, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            center = 1.0 if "norm" in parameter_name else 0.0
            spread = 0.2 if parameter.ndim > 1 else 0.3
            parameter.copy_(center + spread * torch.randn_like(parameter))
    folder = make_llama(tmp_path / "hf", "adds nothing")
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder)
    import_model(str(folder), tmp_path / "run")
    ours = load_model(tmp_path / "run").model
    ids = torch.randint(1, VOCAB, (1, 12))
    with torch.no_grad():
        assert relative_error(ours(ids), theirs(ids).logits.float()) < 2e-5


def test_what_our_layers_do_not_do_is_refused():
    for family, described, message in (
        (GatedDeltaNet(), {"use_gate": False}, "use_gate is False, expected True"),
        (GatedDeltaNet(), {"attn": {"layers": [1]}}, "attn has no num_heads"),
        (
            GatedDeltaNet(),
            {"attn": {"layers": [21], "num_heads": 2}},
            "attn has layer 21, expected each once, of 0 to 20",
        ),
        (
            KimiDeltaAttention(),
            {"attn": {"layers": [1], "num_heads": 2, "qk_norm": True}},
            "attn has qk_norm, expected only layers, num_heads,",
        ),
        (HGRN2(), {"attn": {"layers": [1], "num_heads": 2}}, "attn is .*, expected None"),
        (KimiDeltaAttention(), {"num_v_heads": 4, "num_heads": 2}, "num_v_heads is 4, expected 2"),
    ):
        with pytest.raises(UserError, match=message):
            family.model_of(family.settings(described))
