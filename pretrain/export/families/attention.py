"""Transformers of softmax attention alone: Llama, Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typing_extensions import override

from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.export.families.base import (
    Family,
    Weight,
    expect,
    first_difference,
    general_reason,
    model_weights,
    same,
    settings_by_mixer,
    swiglu_weights,
)
from pretrain.model.spec import BlockSpec, block_specs

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def rotary_theta(theirs: Any) -> float:
    """Return the base of their rotary positions. Raises UserError for other kinds of positions."""
    rope = getattr(theirs, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise UserError(f"the model's rope_type is {kind}, expected default")
    theta = rope.get("rope_theta", getattr(theirs, "rope_theta", 10_000.0))
    if theta is None:
        raise UserError("the model's rope_theta is None, expected a number")
    return float(theta)


def rotary_part(theirs: Any) -> float:
    """Return the share of a head's channels that rotate."""
    rope = getattr(theirs, "rope_parameters", None) or {}
    return float(rope.get("partial_rotary_factor", 1.0))


def attention_difference(
    settings: Any,
    norm_eps: float,
    *,
    qk_norm: bool = False,
    over: str = "head",
    qkv_bias: bool = False,
    gate: bool = False,
    scale: bool = False,
    rotates: bool = True,
) -> str | None:
    """Return what an attention layer of ours has that Llama's, or one like it, has not.

    ``qk_norm``, ``qkv_bias``, ``gate``: whether it has them; ``over``: what a norm is over;
    ``scale``: whether it may have a scale of its own; ``rotates``: whether it must rotate.
    """
    normed = "normalises" if settings.qk_norm else "does not normalise"
    biased = "has" if settings.qkv_bias else "has no"
    gated = "an" if settings.output_gate else "no"
    return first_difference(
        (
            ("attention has a window", settings.window is not None),
            ("attention has no rotary positions", rotates and settings.rope_theta is None),
            (f"attention {normed} queries and keys", settings.qk_norm != qk_norm),
            (f"attention normalises over a {settings.qk_norm_over}", settings.qk_norm_over != over),
            ("norms differ in norm_eps", settings.qk_norm and settings.norm_eps != norm_eps),
            (f"attention {biased} biases", settings.qkv_bias != qkv_bias),
            (f"attention has {gated} output gate", settings.output_gate != gate),
            ("attention has a scale of its own", settings.scale is not None and not scale),
        )
    )


class Llama(Family):
    """Llama: pre-norm, SwiGLU, grouped key heads, rotary positions."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    qk_norm = False
    qkv_bias = False
    whole_width = False  # whether num_heads * head_dim must be hidden_size
    over = "head"  # what queries and keys are normalised over
    block_norm = "pre"
    norms = ("input_layernorm", "post_attention_layernorm")  # of the mixer and of the MLP

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, hidden_act="silu", attention_bias=False, mlp_bias=False)
        if (part := rotary_part(theirs)) != 1:
            raise UserError(f"the model's partial_rotary_factor is {part}, expected 1")
        num_heads = theirs.num_attention_heads
        attention = {
            "num_heads": num_heads,
            "num_kv_heads": theirs.num_key_value_heads,
            "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // num_heads,
            "rope_theta": rotary_theta(theirs),
        }
        if self.qk_norm:
            attention |= {"qk_norm": True, "norm_eps": theirs.rms_norm_eps}
            attention["qk_norm_over"] = self.over
        if self.qkv_bias:
            attention["qkv_bias"] = True
        return {
            "pattern": f"{theirs.num_hidden_layers}*attn",
            "hidden_size": theirs.hidden_size,
            "mixers": {"attn": attention},
            "block_norm": self.block_norm,
            "mlp": {"kind": "swiglu", "intermediate_size": theirs.intermediate_size},
            "vocab_size": theirs.vocab_size,
            "tie_embeddings": bool(theirs.tie_word_embeddings),
            "norm_eps": theirs.rms_norm_eps,
        }

    @override
    def reason_against(self, config: ModelConfig) -> str | None:
        found, reason = settings_by_mixer(config, "attn", experts=self.experts)
        if reason is not None:
            return reason
        settings = found["attn"]
        difference = attention_difference(
            settings,
            config.norm_eps,
            qk_norm=self.qk_norm,
            over=self.over,
            qkv_bias=self.qkv_bias,
        )
        if difference is not None:
            return difference
        if settings.rotary_dim not in (None, settings.head_dim):
            return "a part of a head rotates"
        if self.whole_width and settings.num_heads * settings.head_dim != config.hidden_size:
            return "heads are not as wide as the model"
        return general_reason(config, norms={"attn": self.block_norm})

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        specs = block_specs(config)
        settings = specs[0].config
        return {
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.mlp.width(config.hidden_size),
            "num_hidden_layers": len(specs),
            "num_attention_heads": settings.num_heads,
            "num_key_value_heads": settings.num_kv_heads,
            "head_dim": settings.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": seq_len,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": settings.rope_theta,
            "tie_word_embeddings": config.tie_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": config.init_std,
        }

    @override
    def weights(self, config: ModelConfig) -> Iterator[Weight]:
        yield from model_weights(config, "model.embed_tokens.weight", "model.norm.weight")
        for index, spec in enumerate(block_specs(config)):
            theirs, ours = f"model.layers.{index}", f"blocks.{index}"
            for norm, name in zip(self.norms, ("mixer_norm", "mlp_norm"), strict=True):
                yield same(f"{theirs}.{norm}.weight", f"{ours}.{name}.weight")
            for name in PROJECTIONS:
                yield same(f"{theirs}.self_attn.{name}.weight", f"{ours}.mixer.{name}.weight")
            if self.qkv_bias:
                for name in "qkv":
                    yield same(f"{theirs}.self_attn.{name}_proj.bias", f"{ours}.mixer.{name}_bias")
            if self.qk_norm:
                for name in ("q_norm", "k_norm"):
                    yield same(f"{theirs}.self_attn.{name}.weight", f"{ours}.mixer.{name}")
            yield from self.mlp_weights(theirs, ours, spec)

    def mlp_weights(self, theirs: str, ours: str, spec: BlockSpec) -> Iterator[Weight]:
        """Yield the weights of a block's MLP."""
        return swiglu_weights(f"{theirs}.mlp", f"{ours}.mlp")


class Qwen3(Llama):
    """Qwen3: Llama whose queries and keys are normalised, head by head."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    qk_norm = True

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, use_sliding_window=False)
        return super().model_of(theirs)

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        found = super().config_of(config, vocab_size, seq_len)
        del found["mlp_bias"]
        return found


class Qwen2(Llama):
    """Qwen2 and 2.5: Llama with biases of queries, keys and values."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    qkv_bias = True
    whole_width = True

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, use_sliding_window=False)
        return super().model_of(theirs)

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        found = super().config_of(config, vocab_size, seq_len)
        for name in ("mlp_bias", "attention_bias", "head_dim"):
            del found[name]
        return found


class Olmo2(Llama):
    """OLMo 2: norms of what blocks add, and of queries and keys over all heads."""

    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"
    qk_norm = True
    whole_width = True
    over = "width"
    block_norm = "post"
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        found = super().config_of(config, vocab_size, seq_len)
        for name in ("mlp_bias", "head_dim"):
            del found[name]
        return found
