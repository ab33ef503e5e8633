"""Bamba: blocks of Mamba-2 or of softmax attention, each with an MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typing_extensions import override

from pretrain.config import ModelConfig
from pretrain.export.families.attention import (
    attention_difference,
    rotary_part,
    rotary_theta,
)
from pretrain.export.families.base import (
    Family,
    Weight,
    expect,
    general_reason,
    model_weights,
    same,
    settings_by_mixer,
    swiglu_weights,
)
from pretrain.export.families.mamba2 import (
    check_mamba2,
    mamba2_difference,
    mamba_sizes,
    mixer_weights,
)
from pretrain.model.spec import block_specs
from pretrain.nn.mixers import registry


class Bamba(Family):
    """Bamba, whose attention rotates half of each head."""

    model_type = "bamba"
    architecture = "BambaForCausalLM"

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, hidden_act="silu", attention_bias=False, mlp_bias=False)
        expect(theirs, mamba_conv_bias=True, mamba_proj_bias=False)
        check_mamba2(theirs)
        num_heads, layers = theirs.num_attention_heads, set(theirs.attn_layer_indices or ())
        head_dim = theirs.hidden_size // num_heads
        part = rotary_part(theirs)
        kinds = ["attn" if i in layers else "mamba2" for i in range(theirs.num_hidden_layers)]
        return {
            "pattern": " ".join(kinds),
            "hidden_size": theirs.hidden_size,
            "mixers": {
                "attn": {
                    "num_heads": num_heads,
                    "num_kv_heads": theirs.num_key_value_heads,
                    "head_dim": head_dim,
                    "rope_theta": rotary_theta(theirs),
                    "rotary_dim": None if part == 1 else int(head_dim * part),
                },
                "mamba2": {
                    "expand": theirs.mamba_n_heads * theirs.mamba_d_head / theirs.hidden_size,
                    "head_dim": theirs.mamba_d_head,
                    "state_size": theirs.mamba_d_state,
                    "num_groups": theirs.mamba_n_groups,
                    "conv_size": theirs.mamba_d_conv,
                    "norm_eps": theirs.rms_norm_eps,
                },
            },
            "mlp": {"kind": "swiglu", "intermediate_size": theirs.intermediate_size},
            "vocab_size": theirs.vocab_size,
            "tie_embeddings": bool(theirs.tie_word_embeddings),
            "norm_eps": theirs.rms_norm_eps,
        }

    @override
    def reason_against(self, config: ModelConfig) -> str | None:
        found, reason = settings_by_mixer(config, "mamba2", "attn")
        if reason is not None:
            return reason
        attention, mamba = found["attn"], found["mamba2"]
        if attention.num_heads * attention.head_dim != config.hidden_size:
            return "heads are not as wide as the model"
        return (
            attention_difference(attention, config.norm_eps)
            or mamba2_difference(mamba, config)
            or _rotary_difference(attention)
            or general_reason(config)
        )

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        specs = block_specs(config)
        found, _ = settings_by_mixer(config, "mamba2", "attn")
        attention, mamba = found["attn"], found["mamba2"]
        layers = [i for i, spec in enumerate(specs) if spec.mixer is registry()["attn"]]
        return {
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.mlp.width(config.hidden_size),
            "num_hidden_layers": len(specs),
            "attn_layer_indices": layers,
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_kv_heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": attention.rope_theta,
                "partial_rotary_factor": 0.5,
            },
            **mamba_sizes(mamba, config.hidden_size),
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "max_position_embeddings": seq_len,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "initializer_range": config.init_std,
        }

    @override
    def weights(self, config: ModelConfig) -> Iterator[Weight]:
        yield from model_weights(
            config, "model.embed_tokens.weight", "model.final_layernorm.weight"
        )
        for index, spec in enumerate(block_specs(config)):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            yield same(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_norm.weight")
            if spec.mixer is registry()["attn"]:
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    yield same(f"{theirs}.self_attn.{name}.weight", f"{ours}.mixer.{name}.weight")
            else:
                yield from mixer_weights(
                    f"{theirs}.mamba", f"{ours}.mixer", spec.config, config.hidden_size
                )
            yield same(f"{theirs}.pre_ff_layernorm.weight", f"{ours}.mlp_norm.weight")
            yield from swiglu_weights(f"{theirs}.feed_forward", f"{ours}.mlp")


def _rotary_difference(attention: Any) -> str | None:
    """Return why its transformers class, which rotates half of a head, does not take attention."""
    rotates = attention.rotary_dim or attention.head_dim
    return None if 2 * rotates == attention.head_dim else "another part than half a head rotates"
