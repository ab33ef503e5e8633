"""Mamba-2: blocks of the mixer alone, without an MLP."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from typing_extensions import override

from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.export.families.base import (
    Family,
    Weight,
    convolutions,
    expect,
    first_difference,
    general_reason,
    model_weights,
    rows,
    same,
    settings_by_mixer,
)
from pretrain.model.spec import block_specs

_LONGEST = 2048  # tokens that the published models were trained on; nothing limits them


def mamba_sizes(mamba: Any, hidden_size: int) -> dict[str, Any]:
    """Return the settings of the Mamba-2 layers of their hybrids."""
    return {
        "mamba_n_heads": mamba.num_heads(hidden_size),
        "mamba_d_head": mamba.head_dim,
        "mamba_n_groups": mamba.num_groups,
        "mamba_d_state": mamba.state_size,
        "mamba_d_conv": mamba.conv_size,
        "mamba_expand": int(mamba.expand),
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


def mixer_weights(theirs: str, ours: str, config: Any, hidden_size: int) -> Iterator[Weight]:
    """Yield the weights of one Mamba-2 mixer of settings ``config``."""
    heads = config.num_heads(hidden_size)
    inner, shared = heads * config.head_dim, config.num_groups * config.state_size
    widths = {"z": inner, "x": inner, "b": shared, "c": shared, "dt": heads}
    yield rows(
        f"{theirs}.in_proj.weight", {f"{ours}.{n}_proj.weight": w for n, w in widths.items()}
    )
    convolved = {name: widths[name] for name in "xbc"}
    yield convolutions(
        f"{theirs}.conv1d.weight", {f"{ours}.{n}_conv": w for n, w in convolved.items()}
    )
    yield rows(f"{theirs}.conv1d.bias", {f"{ours}.{n}_conv_bias": w for n, w in convolved.items()})
    for name in ("A_log", "dt_bias", "D"):
        yield same(f"{theirs}.{name}", f"{ours}.{name}")
    yield same(f"{theirs}.norm.weight", f"{ours}.norm")
    yield same(f"{theirs}.out_proj.weight", f"{ours}.o_proj.weight")


def check_mamba2(theirs: Any) -> None:
    """Raise UserError where time steps are bounded, which ours are not."""
    low, high = (float(x) for x in theirs.time_step_limit)
    if low > 0 or high < math.inf:
        raise UserError(f"the model's time_step_limit is [{low}, {high}], expected [0, inf]")


def mamba2_difference(settings: Any, config: ModelConfig) -> str | None:
    """Return what a Mamba-2 layer of ours has that transformers' have not."""
    return first_difference(
        (
            ("there is no convolution", settings.conv_size == 0),
            ("norms differ in norm_eps", settings.norm_eps != config.norm_eps),
            ("expand is not whole", settings.expand != int(settings.expand)),
        )
    )


class Mamba2(Family):
    """Mamba-2 of one or more groups."""

    model_type = "mamba2"
    architecture = "Mamba2ForCausalLM"

    @override
    def model_of(self, theirs: Any) -> dict[str, Any]:
        expect(theirs, hidden_act="silu", use_bias=False, use_conv_bias=True)
        check_mamba2(theirs)
        return {
            "pattern": f"{theirs.num_hidden_layers}*mamba2",
            "hidden_size": theirs.hidden_size,
            "mixers": {
                "mamba2": {
                    "expand": theirs.num_heads * theirs.head_dim / theirs.hidden_size,
                    "head_dim": theirs.head_dim,
                    "state_size": theirs.state_size,
                    "num_groups": theirs.n_groups,
                    "conv_size": theirs.conv_kernel,
                    "norm_eps": theirs.layer_norm_epsilon,
                }
            },
            "mlp": {"kind": "none"},
            "vocab_size": theirs.vocab_size,
            "tie_embeddings": bool(theirs.tie_word_embeddings),
            "norm_eps": theirs.layer_norm_epsilon,
        }

    @override
    def longest_text(self, theirs: Any) -> int:
        return _LONGEST

    @override
    def reason_against(self, config: ModelConfig) -> str | None:
        found, reason = settings_by_mixer(config, "mamba2")
        if reason is not None:
            return reason
        if config.mlp.kind != "none":
            return f"blocks have an MLP ({config.mlp.kind})"
        difference = mamba2_difference(found["mamba2"], config)
        return difference or general_reason(config, mlp="none")

    @override
    def config_of(self, config: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        specs = block_specs(config)
        settings = specs[0].config
        return {
            "vocab_size": vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": len(specs),
            "num_heads": settings.num_heads(config.hidden_size),
            "head_dim": settings.head_dim,
            "state_size": settings.state_size,
            "n_groups": settings.num_groups,
            "conv_kernel": settings.conv_size,
            "expand": int(settings.expand),
            "layer_norm_epsilon": config.norm_eps,
            "use_bias": False,
            "use_conv_bias": True,
            "hidden_act": "silu",
            "tie_word_embeddings": config.tie_embeddings,
            "initializer_range": config.init_std,
        }

    @override
    def weights(self, config: ModelConfig) -> Iterator[Weight]:
        yield from model_weights(config, "backbone.embeddings.weight", "backbone.norm_f.weight")
        for index, spec in enumerate(block_specs(config)):
            theirs, ours = f"backbone.layers.{index}", f"blocks.{index}"
            yield same(f"{theirs}.norm.weight", f"{ours}.mixer_norm.weight")
            yield from mixer_weights(
                f"{theirs}.mixer", f"{ours}.mixer", spec.config, config.hidden_size
            )
