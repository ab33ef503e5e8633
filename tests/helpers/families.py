"""Tiny random models of other libraries, of every family that is imported."""

from __future__ import annotations

import importlib
import sys

import torch
import transformers

# Where fla is installed its kernels are chosen when the module is imported, and need a GPU.
_installed = sys.modules.get("fla")
sys.modules["fla"] = None  # type: ignore[assignment]
for _name in ("qwen3_5", "olmo_hybrid", "qwen3_next"):
    importlib.import_module(f"transformers.models.{_name}.modeling_{_name}")
del sys.modules["fla"]
if _installed is not None:
    sys.modules["fla"] = _installed

VOCAB = 64
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
ATTENTION = {
    **SMALL,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def tiny(name):
    return randomised(CONFIGS[name]())


def randomised(config):
    """A model of transformers with all parameters random, gates and norms among them."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = CLASSES[type(config)](config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                spread = 0.2 if parameter.ndim > 1 else 0.5
                center = 1.0 if parameter_name.endswith("norm.weight") else 0.0
                values = center + spread * torch.randn_like(parameter)
                if (
                    type(model).__name__.startswith(("Qwen3_5", "Qwen3Next"))
                    and "linear_attn.norm" not in parameter_name
                ):
                    # Stored less 1: numbers that adding 1 does not round.
                    values = (values - center + 1) - 1 if center else values
                parameter.copy_(values)
    return model


def llama(**changes):
    return transformers.LlamaConfig(**{**ATTENTION, **changes})


def qwen3():
    return transformers.Qwen3Config(
        **ATTENTION,
        head_dim=12,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 3e4},
        tie_word_embeddings=True,
    )


def mamba2(groups):
    return transformers.Mamba2Config(
        **SMALL,
        num_heads=8,
        head_dim=8,
        state_size=16,
        n_groups=groups,
        conv_kernel=3,
        chunk_size=8,
        pad_token_id=0,
        eos_token_id=0,
    )


def qwen2():
    return transformers.Qwen2Config(**ATTENTION)


def bamba():
    return transformers.BambaConfig(
        **{**ATTENTION, "num_hidden_layers": 3},
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=2,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_chunk_size=8,
    )


def qwen3_5(key_heads=2):
    return transformers.Qwen3_5TextConfig(
        **{**ATTENTION, "num_hidden_layers": 3},
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        head_dim=16,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=3,
    )


def qwen3_next(key_heads=2):
    return transformers.Qwen3NextConfig(
        **{**ATTENTION, "num_hidden_layers": 4},
        layer_types=["linear_attention", "full_attention"] * 2,
        head_dim=16,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=3,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
    )


def qwen3_moe():
    return transformers.Qwen3MoeConfig(
        **{**ATTENTION, "num_hidden_layers": 3},
        head_dim=12,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=False,
        mlp_only_layers=[0],
    )


def mixtral():
    return transformers.MixtralConfig(**ATTENTION, num_local_experts=4, head_dim=8)


def granite(experts=0, positions=None):
    return transformers.GraniteMoeHybridConfig(
        **{**ATTENTION, "num_hidden_layers": 3, "intermediate_size": 16},
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        position_embedding_type=positions,
        shared_intermediate_size=24,
        num_local_experts=experts,
        embedding_multiplier=12,
        residual_multiplier=0.22,
        logits_scaling=6,
        attention_multiplier=0.2,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=2,
        mamba_d_state=16,
        mamba_chunk_size=8,
    )


def olmo_hybrid(key_heads=4, theta=None):
    return transformers.OlmoHybridConfig(
        **{**ATTENTION, "num_hidden_layers": 3},
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        linear_num_key_heads=key_heads,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=3,
        pad_token_id=0,
        eos_token_id=0,
    )


def xlstm():
    return transformers.xLSTMConfig(
        **SMALL,
        num_heads=2,
        ffn_round_up_to_multiple_of=8,
        chunk_size=8,
        autocast_kernel_dtype="float32",
        use_cache=False,  # which is made of the wrong shape in transformers 5.23
        pad_token_id=0,
        eos_token_id=0,
    )


CLASSES = {
    transformers.LlamaConfig: transformers.LlamaForCausalLM,
    transformers.Qwen2Config: transformers.Qwen2ForCausalLM,
    transformers.Qwen3Config: transformers.Qwen3ForCausalLM,
    transformers.Mamba2Config: transformers.Mamba2ForCausalLM,
    transformers.BambaConfig: transformers.BambaForCausalLM,
    transformers.Qwen3_5TextConfig: transformers.Qwen3_5ForCausalLM,
    transformers.Qwen3NextConfig: transformers.Qwen3NextForCausalLM,
    transformers.Qwen3MoeConfig: transformers.Qwen3MoeForCausalLM,
    transformers.MixtralConfig: transformers.MixtralForCausalLM,
    transformers.GraniteMoeHybridConfig: transformers.GraniteMoeHybridForCausalLM,
    transformers.Olmo2Config: transformers.Olmo2ForCausalLM,
    transformers.OlmoHybridConfig: transformers.OlmoHybridForCausalLM,
    transformers.xLSTMConfig: transformers.xLSTMForCausalLM,
}
CONFIGS = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True, num_key_value_heads=4),
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mamba2": lambda: mamba2(1),
    "mamba2, groups": lambda: mamba2(2),
    "bamba": bamba,
    "qwen3_5": qwen3_5,
    "qwen3_next": qwen3_next,
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "granite": granite,
    "granite, experts": lambda: granite(experts=4, positions="rope"),
    "olmo2": lambda: transformers.Olmo2Config(**ATTENTION, pad_token_id=0, eos_token_id=0),
    "olmo_hybrid": olmo_hybrid,
    "olmo_hybrid, rotary": lambda: olmo_hybrid(2, theta=3e4),
    "xlstm": xlstm,
}
