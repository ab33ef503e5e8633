"""xLSTM-7B and its like: mLSTM layers with a SwiGLU, and capped logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typing_extensions import override

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
from pretrain.model.spec import block_specs

_LAYER = {
    "q.weight": "q_proj.weight",
    "k.weight": "k_proj.weight",
    "v.weight": "v_proj.weight",
    "ogate_preact.weight": "g_proj.weight",
    "igate_preact.weight": "i_proj.weight",
    "igate_preact.bias": "i_bias",
    "fgate_preact.weight": "f_proj.weight",
    "fgate_preact.bias": "f_bias",
    "multihead_norm.weight": "norm",
    "out_proj.weight": "o_proj.weight",
}
_FFN = ("proj_up_gate", "proj_up", "proj_down")
_LONGEST = 8192  # tokens that xLSTM-7B was trained on; nothing limits them


class XLSTM(Family):
    """xLSTM, of mLSTM layers alone."""

    model_type = "xlstm"
    architecture = "xLSTMForCausalLM"

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, use_bias=False, add_out_norm=True, weight_mode="single")
        expect(theirs, v_dim_factor=1.0, eps=1e-6)
        multiple = theirs.ffn_round_up_to_multiple_of
        width = -(-int(theirs.hidden_size * theirs.ffn_proj_factor) // multiple) * multiple
        return {
            "pattern": f"{theirs.num_hidden_layers}*mlstm",
            "hidden_size": theirs.hidden_size,
            "mixers": {
                "mlstm": {
                    "num_heads": theirs.num_heads,
                    "qk_ratio": theirs.qk_dim_factor,
                    "gate_cap": theirs.gate_soft_cap,
                    "norm_eps": theirs.norm_eps,
                }
            },
            "mlp": {"kind": "swiglu", "intermediate_size": width},
            "vocab_size": theirs.vocab_size,
            "tie_embeddings": bool(theirs.tie_word_embeddings),
            "norm_eps": theirs.norm_eps,
            "logit_softcap": theirs.output_logit_soft_cap,
        }

    @override
    def longest_text(self, theirs: Any) -> int:
        return _LONGEST

    @override
    def reason_against(self, config: ModelConfig) -> str | None:
        found, reason = settings_by_mixer(config, "mlstm")
        if reason is not None:
            return reason
        settings = found["mlstm"]
        return first_difference(
            (
                (
                    "heads are not as wide as the model",
                    settings.num_heads * settings.head_dim != config.hidden_size,
                ),
                ("gates are not capped", settings.gate_cap is None),
                ("norms differ in norm_eps", settings.norm_eps != config.norm_eps),
            )
        ) or general_reason(config, capped=True)

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        specs = block_specs(config)
        settings = specs[0].config
        width = config.mlp.width(config.hidden_size)
        return {
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": len(specs),
            "num_heads": settings.num_heads,
            "qk_dim_factor": settings.qk_ratio,
            "v_dim_factor": 1.0,
            "gate_soft_cap": settings.gate_cap,
            "output_logit_soft_cap": config.logit_softcap,
            "norm_eps": config.norm_eps,
            # A little more, for the product is cut to a whole number.
            "ffn_proj_factor": (width + 0.5) / config.hidden_size,
            "ffn_round_up_to_multiple_of": 1,
            "use_bias": False,
            "add_out_norm": True,
            "weight_mode": "single",
            "tie_word_embeddings": config.tie_embeddings,
        }

    @override
    def weights(self, config: ModelConfig) -> Iterator[Weight]:
        yield from model_weights(config, "backbone.embeddings.weight", "backbone.out_norm.weight")
        for index in range(len(block_specs(config))):
            theirs, ours = f"backbone.blocks.{index}", f"blocks.{index}"
            yield same(f"{theirs}.norm_mlstm.weight", f"{ours}.mixer_norm.weight")
            for other, name in _LAYER.items():
                yield same(f"{theirs}.mlstm_layer.{other}", f"{ours}.mixer.{name}")
            yield same(f"{theirs}.norm_ffn.weight", f"{ours}.mlp_norm.weight")
            yield from swiglu_weights(f"{theirs}.ffn", f"{ours}.mlp", _FFN)
