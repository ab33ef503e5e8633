"""Models whose MLPs are RWKV's channel mixing, and add something from the first step on."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.nn.channel_mixing import ChannelMixing
from pretrain.nn.parameters import draw_like

CHANNELS: dict[str, Any] = {"mlp": {"kind": "rwkv", "ratio": 2}}


@torch.no_grad()
def with_output(model: Any) -> Any:
    """Give the output projections, which start at 0, values that are the same in every layout."""
    for name, layer in model.named_modules():
        if isinstance(layer, ChannelMixing):
            weight = layer.down_proj.weight
            weight.copy_(draw_like(weight, 0.3, name))
    return model
