"""Granite 4 hybrids: Mamba-2 and softmax attention, with factors on all that is added up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from typing_extensions import override

from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.export.families.attention import PROJECTIONS, attention_difference, rotary_theta
from pretrain.export.families.base import (
    Family,
    Weight,
    expect,
    first_difference,
    general_reason,
    model_weights,
    rows,
    same,
    settings_by_mixer,
)
from pretrain.export.families.experts import expert_difference, expert_weights
from pretrain.export.families.mamba2 import (
    check_mamba2,
    mamba2_difference,
    mamba_sizes,
    mixer_weights,
)
from pretrain.model.spec import block_specs
from pretrain.nn.mixers import registry

_KINDS = {"linear_attention": "mamba2", "full_attention": "attn"}
# Of a weight's name: in the class, and in files.
_FILED = {
    ".block_sparse_moe.experts.gate_up_proj": ".block_sparse_moe.input_linear.weight",
    ".block_sparse_moe.experts.down_proj": ".block_sparse_moe.output_linear.weight",
    ".block_sparse_moe.router.weight": ".block_sparse_moe.router.layer.weight",
}


class GraniteHybrid(Family):
    """Granite 4, with experts (of which one is shared) or with MLPs."""

    model_type = "granitemoehybrid"
    architecture = "GraniteMoeHybridForCausalLM"
    experts = True

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, hidden_act="silu", attention_bias=False)
        expect(theirs, mamba_conv_bias=True, mamba_proj_bias=False)
        check_mamba2(theirs)
        positions = theirs.position_embedding_type
        if positions not in (None, "nope", "rope"):
            raise UserError(
                f"the model's position_embedding_type is {positions}, expected rope or none"
            )
        num_heads = theirs.num_attention_heads
        found = {
            "pattern": " ".join(_KINDS[kind] for kind in theirs.layer_types),
            "hidden_size": theirs.hidden_size,
            "mixers": {
                "attn": {
                    "num_heads": num_heads,
                    "num_kv_heads": theirs.num_key_value_heads,
                    "head_dim": theirs.hidden_size // num_heads,
                    "rope_theta": rotary_theta(theirs) if positions == "rope" else None,
                    "scale": theirs.attention_multiplier,
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
            "mlp": {"kind": "swiglu", "intermediate_size": theirs.shared_intermediate_size},
            "vocab_size": theirs.vocab_size,
            "tie_embeddings": bool(theirs.tie_word_embeddings),
            "norm_eps": theirs.rms_norm_eps,
            "embedding_scale": theirs.embedding_multiplier,
            "residual_scale": theirs.residual_multiplier,
            "logit_scale": 1 / theirs.logits_scaling,
        }
        if theirs.num_local_experts:
            found["moe"] = {
                "num_experts": theirs.num_local_experts,
                "top_k": theirs.num_experts_per_tok,
                "intermediate_size": theirs.intermediate_size,
                "shared_intermediate_size": theirs.shared_intermediate_size,
            }
        return found

    @override
    def reason_against(self, config: ModelConfig) -> str | None:
        found, reason = settings_by_mixer(config, *_KINDS.values(), experts=True)
        if reason is not None:
            return reason
        attn, d = found["attn"], config.hidden_size
        return (
            attention_difference(attn, config.norm_eps, scale=True, rotates=False)
            or first_difference(
                (
                    ("heads are not as wide as the model", attn.num_heads * attn.head_dim != d),
                    ("a part of a head rotates", attn.rotary_dim not in (None, attn.head_dim)),
                )
            )
            or mamba2_difference(found["mamba2"], config)
            or (expert_difference(config, shared=True, plain=True) if config.moe else None)
            or general_reason(config, scaled=True)
        )

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        specs, moe = block_specs(config), config.moe
        found, _ = settings_by_mixer(config, *_KINDS.values(), experts=True)
        attn, mamba = found["attn"], found["mamba2"]
        types = {registry()[name]: kind for kind, name in _KINDS.items()}
        rope = {"rope_type": "default", "rope_theta": attn.rope_theta}
        width = config.mlp.width(config.hidden_size)
        return {
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": moe.intermediate_size if moe else width,
            "shared_intermediate_size": moe.shared_intermediate_size if moe else width,
            "num_local_experts": moe.num_experts if moe else 0,
            "num_experts_per_tok": moe.top_k if moe else 0,
            "num_hidden_layers": len(specs),
            "layer_types": [types[spec.mixer] for spec in specs],
            "num_attention_heads": attn.num_heads,
            "num_key_value_heads": attn.num_kv_heads,
            "position_embedding_type": None if attn.rope_theta is None else "rope",
            "rope_parameters": None if attn.rope_theta is None else rope,
            "attention_multiplier": attn.scale or attn.head_dim**-0.5,
            "embedding_multiplier": config.embedding_scale,
            "residual_multiplier": config.residual_scale,
            "logits_scaling": 1 / config.logit_scale,
            **mamba_sizes(mamba, config.hidden_size),
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
        d = config.hidden_size
        for index, spec in enumerate(block_specs(config)):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            yield same(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_norm.weight")
            if spec.mixer is registry()["attn"]:
                for name in PROJECTIONS:
                    yield same(f"{theirs}.self_attn.{name}.weight", f"{ours}.mixer.{name}.weight")
            else:
                yield from mixer_weights(f"{theirs}.mamba", f"{ours}.mixer", spec.config, d)
            yield same(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight")
            if spec.moe is None:
                width, mlp = config.mlp.width(d), f"{ours}.mlp"
            else:
                width, mlp = spec.moe.shared_intermediate_size, f"{ours}.mlp.shared"
                yield from expert_weights(f"{theirs}.block_sparse_moe", f"{ours}.mlp", "router")
            halves = {f"{mlp}.{name}_proj.weight": width for name in ("gate", "up")}
            yield rows(f"{theirs}.shared_mlp.input_linear.weight", halves)
            yield same(f"{theirs}.shared_mlp.output_linear.weight", f"{mlp}.down_proj.weight")

    @override
    def filed(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        for there, filed in _FILED.items():
            name = name.replace(there, filed)
        yield name, value
