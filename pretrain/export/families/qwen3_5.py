"""Qwen3.5, its text model: Gated DeltaNet, and softmax attention with an output gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.config import ModelConfig
from pretrain.export.families.attention import attention_difference, rotary_part, rotary_theta
from pretrain.export.families.base import (
    Family,
    Weight,
    expect,
    first_difference,
    gdn_convolutions,
    gdn_sizes,
    gdn_widths,
    general_reason,
    rows,
    same,
    settings_by_mixer,
    swiglu_weights,
)
from pretrain.model.spec import BlockSpec, block_specs
from pretrain.nn.mixers import registry

_KINDS = {"linear_attention": "gdn", "full_attention": "attn"}


class Qwen35(Family):
    """Qwen3.5, text alone."""

    model_type = "qwen3_5_text"
    architecture = "Qwen3_5ForCausalLM"

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, hidden_act="silu", attention_bias=False)
        eps, part = theirs.rms_norm_eps, rotary_part(theirs)
        return {
            "pattern": " ".join(_KINDS[kind] for kind in theirs.layer_types),
            "hidden_size": theirs.hidden_size,
            "mixers": {
                "attn": {
                    "num_heads": theirs.num_attention_heads,
                    "num_kv_heads": theirs.num_key_value_heads,
                    "head_dim": theirs.head_dim,
                    "rope_theta": rotary_theta(theirs),
                    "rotary_dim": None if part == 1 else int(theirs.head_dim * part),
                    "qk_norm": True,
                    "norm_eps": eps,
                    "output_gate": True,
                },
                "gdn": {
                    "num_heads": theirs.linear_num_value_heads,
                    "num_qk_heads": theirs.linear_num_key_heads,
                    "head_dim": theirs.linear_key_head_dim,
                    "expand_v": theirs.linear_value_head_dim / theirs.linear_key_head_dim,
                    "conv_size": theirs.linear_conv_kernel_dim,
                    "norm_eps": eps,
                },
            },
            "mlp": {"kind": "swiglu", "intermediate_size": theirs.intermediate_size},
            "vocab_size": theirs.vocab_size,
            "tie_embeddings": bool(theirs.tie_word_embeddings),
            "norm_eps": eps,
        }

    @override
    def reason_against(self, config: ModelConfig) -> str | None:
        found, reason = settings_by_mixer(config, *_KINDS.values(), experts=self.experts)
        if reason is not None:
            return reason
        attn, gdn = found["attn"], found["gdn"]
        eps = config.norm_eps
        return (
            attention_difference(attn, eps, qk_norm=True, gate=True)
            or first_difference(
                (
                    ("norms differ in norm_eps", gdn.norm_eps != eps),
                    ("there is no convolution", gdn.conv_size == 0),
                    ("eigenvalues may be negative", gdn.allow_neg_eigval),
                )
            )
            or general_reason(config)
        )

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        specs = block_specs(config)
        is_attention = [spec.mixer is registry()["attn"] for spec in specs]
        found, _ = settings_by_mixer(config, *_KINDS.values(), experts=self.experts)
        attn, gdn = found["attn"], found["gdn"]
        return {
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.mlp.width(config.hidden_size),
            "num_hidden_layers": len(specs),
            "layer_types": [
                "full_attention" if attention else "linear_attention" for attention in is_attention
            ],
            "num_attention_heads": attn.num_heads,
            "num_key_value_heads": attn.num_kv_heads,
            "head_dim": attn.head_dim,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": attn.rope_theta,
                "partial_rotary_factor": (attn.rotary_dim or attn.head_dim) / attn.head_dim,
            },
            **gdn_sizes(gdn),
            "attention_bias": False,
            "hidden_act": "silu",
            "max_position_embeddings": seq_len,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "initializer_range": config.init_std,
        }

    @override
    def weights(self, config: ModelConfig) -> Iterator[Weight]:
        yield same("model.embed_tokens.weight", "embedding.weight")
        yield from_zero("model.norm.weight", "final_norm.weight")
        if not config.tie_embeddings:
            yield same("lm_head.weight", "head.weight")
        for index, spec in enumerate(block_specs(config)):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            yield from_zero(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_norm.weight")
            if spec.mixer is registry()["attn"]:
                yield from _attention(f"{theirs}.self_attn", f"{ours}.mixer", spec.config.num_heads)
            else:
                gdn = f"{theirs}.linear_attn", f"{ours}.mixer", spec.config
                yield from self.gdn_projections(*gdn)
                yield from _gdn(*gdn)
            yield from_zero(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight")
            yield from self.mlp_weights(theirs, ours, spec)

    def gdn_projections(self, theirs: str, ours: str, config: Any) -> Iterator[Weight]:
        """Yield the projections of a Gated DeltaNet's input."""
        widths = gdn_widths(config)
        projections = {f"{ours}.{name}_proj.weight": width for name, width in widths.items()}
        yield rows(f"{theirs}.in_proj_qkv.weight", projections)
        for name, other in (("z", "g"), ("b", "b"), ("a", "a")):
            yield same(f"{theirs}.in_proj_{name}.weight", f"{ours}.{other}_proj.weight")

    def mlp_weights(self, theirs: str, ours: str, spec: BlockSpec) -> Iterator[Weight]:
        """Yield the weights of a block's MLP."""
        return swiglu_weights(f"{theirs}.mlp", f"{ours}.mlp")


def from_zero(theirs: str, ours: str) -> Weight:
    """Return a norm's weight that they store less 1."""
    return Weight(theirs, (ours,), lambda x: (x.float() + 1,), lambda parts: parts[0].float() - 1)


def _attention(theirs: str, ours: str, num_heads: int) -> Iterator[Weight]:
    def split(x: Tensor) -> Sequence[Tensor]:
        q, gate = x.unflatten(0, (num_heads, 2, -1)).unbind(1)
        return q.flatten(0, 1), gate.flatten(0, 1)

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([x.unflatten(0, (num_heads, -1)) for x in parts], 1).flatten(0, 2)

    yield Weight(
        f"{theirs}.q_proj.weight", (f"{ours}.q_proj.weight", f"{ours}.g_proj.weight"), split, join
    )
    for name in ("k_proj", "v_proj", "o_proj"):
        yield same(f"{theirs}.{name}.weight", f"{ours}.{name}.weight")
    for name in ("q_norm", "k_norm"):
        yield from_zero(f"{theirs}.{name}.weight", f"{ours}.{name}")


def _gdn(theirs: str, ours: str, config: Any) -> Iterator[Weight]:
    yield gdn_convolutions(theirs, ours, config)
    for name in ("A_log", "dt_bias"):
        yield same(f"{theirs}.{name}", f"{ours}.{name}")
    yield same(f"{theirs}.norm.weight", f"{ours}.norm")
    yield same(f"{theirs}.out_proj.weight", f"{ours}.o_proj.weight")
