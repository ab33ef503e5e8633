"""OLMo-Hybrid: Gated DeltaNet in pre-norm blocks, softmax attention in blocks that norm outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typing_extensions import override

from pretrain.config import ModelConfig
from pretrain.export.families.attention import PROJECTIONS, attention_difference, rotary_theta
from pretrain.export.families.base import (
    Family,
    Weight,
    expect,
    first_difference,
    gdn_convolutions,
    gdn_sizes,
    general_reason,
    model_weights,
    same,
    settings_by_mixer,
    swiglu_weights,
)
from pretrain.model.spec import block_specs
from pretrain.nn.mixers import registry

_KINDS = {"linear_attention": "gdn", "full_attention": "attn"}
_NORM_EPS = 1e-5  # of the norm in Gated DeltaNet, whatever the config says
_GDN = {
    **{f"{name}_proj.weight": f"{name}_proj.weight" for name in ("q", "k", "v", "g", "a", "b")},
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "o_norm.weight": "norm",
    "o_proj.weight": "o_proj.weight",
}


class OlmoHybrid(Family):
    """OLMo-Hybrid, with rotary positions or without."""

    model_type = "olmo_hybrid"
    architecture = "OlmoHybridForCausalLM"

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, hidden_act="silu", attention_bias=False)
        rope = theirs.rope_parameters or {}
        rotates = rope.get("rope_theta") is not None
        return {
            "pattern": " ".join(_KINDS[kind] for kind in theirs.layer_types),
            "hidden_size": theirs.hidden_size,
            "mixers": {
                "attn": {
                    "num_heads": theirs.num_attention_heads,
                    "num_kv_heads": theirs.num_key_value_heads,
                    "head_dim": theirs.hidden_size // theirs.num_attention_heads,
                    "rope_theta": rotary_theta(theirs) if rotates else None,
                    "qk_norm": True,
                    "qk_norm_over": "width",
                    "norm_eps": theirs.rms_norm_eps,
                },
                "gdn": {
                    "num_heads": theirs.linear_num_value_heads,
                    "num_qk_heads": theirs.linear_num_key_heads,
                    "head_dim": theirs.linear_key_head_dim,
                    "expand_v": theirs.linear_value_head_dim / theirs.linear_key_head_dim,
                    "conv_size": theirs.linear_conv_kernel_dim,
                    "allow_neg_eigval": theirs.linear_allow_neg_eigval,
                    "norm_eps": _NORM_EPS,
                },
            },
            "block_norms": {"attn": "post"},
            "mlp": {"kind": "swiglu", "intermediate_size": theirs.intermediate_size},
            "vocab_size": theirs.vocab_size,
            "tie_embeddings": bool(theirs.tie_word_embeddings),
            "norm_eps": theirs.rms_norm_eps,
        }

    @override
    def reason_against(self, config: ModelConfig) -> str | None:
        found, reason = settings_by_mixer(config, *_KINDS.values())
        if reason is not None:
            return reason
        attn, gdn = found["attn"], found["gdn"]
        wide = attn.num_heads * attn.head_dim == config.hidden_size
        return (
            attention_difference(attn, config.norm_eps, qk_norm=True, over="width", rotates=False)
            or first_difference(
                (
                    ("heads are not as wide as the model", not wide),
                    ("norms differ in norm_eps", gdn.norm_eps != _NORM_EPS),
                    ("there is no convolution", gdn.conv_size == 0),
                )
            )
            or general_reason(config, norms={"attn": "post"})
        )

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        specs = block_specs(config)
        found, _ = settings_by_mixer(config, *_KINDS.values())
        attn, gdn = found["attn"], found["gdn"]
        types = {registry()[name]: kind for kind, name in _KINDS.items()}
        return {
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.mlp.width(config.hidden_size),
            "num_hidden_layers": len(specs),
            "layer_types": [types[spec.mixer] for spec in specs],
            "num_attention_heads": attn.num_heads,
            "num_key_value_heads": attn.num_kv_heads,
            # Without the kind, or without the base, a default of theirs would rotate.
            "rope_parameters": {"rope_type": "default", "rope_theta": attn.rope_theta},
            **gdn_sizes(gdn),
            "linear_allow_neg_eigval": gdn.allow_neg_eigval,
            "attention_bias": False,
            "hidden_act": "silu",
            "max_position_embeddings": seq_len,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "initializer_range": config.init_std,
        }

    @override
    def weights(self, config: ModelConfig) -> Iterator[Weight]:
        yield from model_weights(config, "model.embed_tokens.weight", "model.norm.weight")
        for index, spec in enumerate(block_specs(config)):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            if spec.mixer is registry()["attn"]:
                norms = ("post_attention_layernorm", "post_feedforward_layernorm")
                for name in PROJECTIONS:
                    yield same(f"{theirs}.self_attn.{name}.weight", f"{ours}.mixer.{name}.weight")
                for name in ("q_norm", "k_norm"):
                    yield same(f"{theirs}.self_attn.{name}.weight", f"{ours}.mixer.{name}")
            else:
                norms = ("input_layernorm", "post_attention_layernorm")
                for other, name in _GDN.items():
                    yield same(f"{theirs}.linear_attn.{other}", f"{ours}.mixer.{name}")
                yield gdn_convolutions(f"{theirs}.linear_attn", f"{ours}.mixer", spec.config)
            for norm, name in zip(norms, ("mixer_norm", "mlp_norm"), strict=True):
                yield same(f"{theirs}.{norm}.weight", f"{ours}.{name}.weight")
            yield from swiglu_weights(f"{theirs}.mlp", f"{ours}.mlp")
