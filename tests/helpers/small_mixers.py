"""Settings of every mixer, small enough for float64 on a CPU."""

from __future__ import annotations

from typing import Any

# Settings small enough for float64 on a CPU; a mixer without an entry is built with its defaults.
SMALL: dict[str, list[dict[str, Any]]] = {
    "attn": [
        {"num_heads": 4, "num_kv_heads": 2},
        {"num_heads": 2, "qk_norm": True, "rope_theta": None},
        {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "qk_norm_over": "width"},
        {
            "num_heads": 4,
            "num_kv_heads": 1,
            "qk_norm": True,
            "rotary_dim": 2,
            "output_gate": True,
            "qkv_bias": True,
            "scale": 0.3,
        },
    ],
    "swa": [{"num_heads": 2, "window": 5}],
    "sliced_attn": [
        {"num_heads": 4, "num_kv_heads": 2, "slice_size": 6, "stride": 4},
        {"num_heads": 2, "slice_size": 5, "stride": 3, "first": "strided"},
    ],
    "linear_attn": [
        {"num_heads": 2, "chunk_size": 8},
        {"num_heads": 2, "feature_map": "elu", "normalize": True, "expand_v": 0.5},
    ],
    "retnet": [{"num_heads": 2, "chunk_size": 8}, {"num_heads": 3, "rope_theta": None}],
    "gla": [{"num_heads": 2, "gate_rank": 3, "chunk_size": 16}],
    "hgrn": [
        {"conv_size": 3, "lower_bound": "own"},
        {"expand": 1.5},
        {"complex_state": True, "conv_size": 3},
    ],
    "hgrn2": [
        {"head_dim": 4, "chunk_size": 8},
        {"num_heads": 3, "head_dim": 5, "lower_bound": "shared"},
    ],
    "mamba": [{"expand": 1.0, "state_size": 5, "dt_rank": 3, "chunk_size": 8}],
    "mamba2": [
        {"head_dim": 8, "state_size": 6, "chunk_size": 16},
        {"head_dim": 4, "state_size": 5, "num_groups": 3, "conv_size": 0},
    ],
    "mamba3": [
        {"head_dim": 8, "state_size": 8, "chunk_size": 16},
        {"head_dim": 4, "state_size": 5, "num_groups": 3, "rope_fraction": 0},
    ],
    "deltanet": [{"num_heads": 2, "head_dim": 4, "allow_neg_eigval": True}],
    "gdn": [
        {"num_heads": 2, "head_dim": 4, "chunk_size": 8},
        {"num_heads": 3, "head_dim": 4, "expand_v": 1, "allow_neg_eigval": True},
        {"num_heads": 4, "num_qk_heads": 2, "head_dim": 4, "chunk_size": 8},
    ],
    "kda": [
        {"num_heads": 2, "head_dim": 4, "chunk_size": 8},
        {"num_heads": 2, "head_dim": 4, "conv_size": 0, "gate_bias": True},
    ],
    "gdn2": [{"num_heads": 2, "head_dim": 4, "expand_v": 1.5, "chunk_size": 8}],
    "comba": [{"num_heads": 2, "head_dim": 4, "chunk_size": 8}],
    "delta_product": [
        {"num_heads": 2, "head_dim": 4, "chunk_size": 16},
        {"num_heads": 2, "head_dim": 4, "num_householder": 3, "use_decay": False, "chunk_size": 12},
    ],
    "m2rnn": [
        {"num_heads": 4, "head_dim": 5, "value_dim": 3},
        {"num_heads": 4, "num_qk_heads": 2, "head_dim": 3, "value_dim": 4, "state_grad_clip": 0.01},
        {"num_heads": 2, "head_dim": 4, "value_dim": 4, "conv_size": 0, "recurrent_init": "normal"},
    ],
    "para_gru": [{"num_heads": 2}, {"num_heads": 3, "head_dim": 4, "conv_size": 0}],
    "para_lstm": [{"num_heads": 2}],
    "quasi_lstm": [{"expand": 1.5}],
    "mlstm": [
        {"num_heads": 2, "chunk_size": 8},
        {"num_heads": 3, "head_dim": 4, "qk_ratio": 1.5, "gate_cap": None},
    ],
    "rwkv7": [
        {"num_heads": 2, "decay_rank": 3, "gate_rank": 5, "zero_output": False, "chunk_size": 8},
    ],
    "s4": [{"state_size": 6, "chunk_size": 8}],
    "s4d": [
        {"state_size": 6, "chunk_size": 8},
        {"state_size": 4, "init": "legs", "discretization": "bilinear", "output": "glu"},
    ],
    "lightnet": [{"num_heads": 2, "head_dim": 4, "gate_rank": 3, "chunk_size": 8}],
    "aaren": [{"num_heads": 2, "chunk_size": 8}],
    "mesa": [{"num_heads": 2, "head_dim": 4, "iterations": 12, "chunk_size": 8}],
    "jrt": [{"num_heads": 2, "feature_dim": 3, "chunk_size": 8}],
    "moneta": [
        {"num_heads": 2, "gate_rank": 3, "chunk_size": 8, "expansion": 1},
        {"num_heads": 3, "memory": "linear", "conv_size": 0},
    ],
    "yaad": [{"num_heads": 2, "memory": "linear", "gate_rank": 3, "chunk_size": 8}],
    "memora": [{"num_heads": 2, "memory": "linear", "gate_rank": 3, "chunk_size": 4}],
    "plstm": [
        {"num_heads": 2, "chunk_size": 8},
        {"num_heads": 3, "transition_size": 1, "chunk_size": 8, "conv_size": 0},
    ],
    "mlstm_v1": [{"num_heads": 2, "chunk_size": 8}],
    "lstm": [{"num_heads": 2}],
    "gru": [{"num_heads": 2, "state_grad_clip": 0.01}],
    "slstm": [{"num_heads": 2}],
    "elman": [{"num_heads": 2}, {"num_heads": 3}],
    "tcnca": [
        {
            "num_heads": 2,
            "head_dim": 4,
            "attention_chunk": 16,
            "conv_layers": 2,
            "conv_size": 5,
            "dilation_factor": 3,
        }
    ],
    "rat": [{"num_heads": 4, "chunk_size": 8}, {"num_heads": 2, "head_dim": 4, "chunk_size": 3}],
}
