"""Softmax attention between the layers of models of flash-linear-attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.common.errors import UserError
from pretrain.export.families.attention import PROJECTIONS
from pretrain.export.families.base import Weight, same

_DEFAULTS = {"num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10_000.0}
_KNOWN = ("layers", "num_heads", *_DEFAULTS)


@dataclass
class Hybrid:
    """Which layers are attention: its name here by the layer, and its settings by that name."""

    names: dict[int, str]
    mixers: dict[str, dict[str, Any]]


def attention_layers(theirs: Any) -> Hybrid:
    """Return the attention that their ``attn`` describes, once or for several kinds of layers.

    Raises UserError for what is not known of it.
    """
    found = Hybrid({}, {})
    described = theirs.attn or []
    for number, each in enumerate([described] if isinstance(described, dict) else described):
        if unknown := [name for name in each if name not in _KNOWN]:
            raise UserError(f"the model's attn has {unknown[0]}, expected only {', '.join(_KNOWN)}")
        if missing := [name for name in ("layers", "num_heads") if name not in each]:
            raise UserError(f"the model's attn has no {missing[0]}")
        kind = {**_DEFAULTS, **each}
        name = f"attn_{number}" if number else "attn"
        found.mixers[name] = {
            **({"kind": "attn"} if number else {}),
            "num_heads": kind["num_heads"],
            "num_kv_heads": kind["num_kv_heads"],
            "head_dim": theirs.hidden_size // kind["num_heads"],
            "qkv_bias": kind["qkv_bias"],
            "window": kind["window_size"],
            "rope_theta": kind["rope_theta"],
        }
        for layer in kind["layers"]:
            if layer in found.names or not 0 <= layer < theirs.num_hidden_layers:
                raise UserError(
                    f"the model's attn has layer {layer}, expected each once, of 0 to "
                    f"{theirs.num_hidden_layers - 1}"
                )
            found.names[layer] = name
    return found


def attention_weights(theirs: str, ours: str, config: Any) -> Iterator[Weight]:
    """Yield the weights of one attention layer of settings ``config``."""
    for name in PROJECTIONS:
        yield same(f"{theirs}.{name}.weight", f"{ours}.{name}.weight")
    for name in "qkv" if config.qkv_bias else "":
        yield same(f"{theirs}.{name}_proj.bias", f"{ours}.{name}_bias")
