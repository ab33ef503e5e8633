"""How a mixer begins as a trained attention layer (``initialize.convert``), said by each mixer.

A mixer's :attr:`.Mixer.conversion` names what takes over the attention's q, k, v and output
projections; the rest of the mixer is as it is initialised, but for short convolutions, which begin
as the identity, and gates for which the mixer has better values. Everything is of this process's
heads, so that a model converts under tensor parallelism as it does on one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

QKVO = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}


def _no_starts(config: Any) -> dict[str, float]:
    return {}


def slow_decay(config: Any) -> dict[str, float]:
    """Return values of A_log and dt_bias, whose softplus is 0.01, that make a decay of 0.99."""
    return {"A_log": 0.0, "dt_bias": math.log(math.expm1(0.01))}


@dataclass(frozen=True)
class Conversion:
    """What a mixer takes over of an attention layer.

    Attributes:
        sizes: Returns the settings that make it fit, of the attention's settings and the model's
            width.
        projections: By the mixer's projection, the attention's that it begins as.
        starts: Returns the values of other parameters, by name; those that do not exist are left
            out.
        rest: Whether every other parameter of the attention is taken too, by its name.
    """

    sizes: Callable[[Mapping[str, Any], int], dict[str, Any]]
    projections: Mapping[str, str]
    starts: Callable[[Any], dict[str, float]] = _no_starts
    rest: bool = False


def head_sizes(attention: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """Return the settings of a mixer with the attention's heads, for keys and values alike."""
    return {"num_heads": attention["num_heads"], "head_dim": attention["head_dim"]}


def value_sizes(attention: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """Return the same for a mixer whose values may be wider than its keys."""
    return {**head_sizes(attention, hidden_size), "expand_v": 1.0}


def converted(
    conversion: Conversion,
    config: Any,
    shapes: Mapping[str, Tensor],
    attention: Mapping[str, Tensor],
    head_dim: int,
) -> dict[str, Tensor]:
    """Return the values that a mixer takes over, by the names of its parameters.

    ``config`` are the mixer's settings, ``shapes`` its parameters, by name, ``attention`` those of
    the attention layer, whose heads have ``head_dim`` channels. A head of keys and values is
    repeated for all heads of the mixer that share it, and for every step that one makes per token.
    """
    found: dict[str, Tensor] = {}
    if conversion.rest:
        found |= {name: value for name, value in attention.items() if name in shapes}
    for projection, part in conversion.projections.items():
        weight = attention[f"{part}_proj.weight"]
        wanted = shapes[f"{projection}.weight"]
        if part in "kv":
            heads = weight.unflatten(0, (-1, head_dim))
            weight = heads.repeat_interleave(len(wanted) // len(weight), 0).flatten(0, 1)
        found[f"{projection}.weight"] = weight
        convolution = projection.replace("_proj", "_conv")
        if convolution in shapes:
            found[convolution] = _identity(shapes[convolution])
    for name, value in conversion.starts(config).items():
        if name in shapes:
            found[name] = torch.full_like(shapes[name], value)
    return found


def _identity(convolution: Tensor) -> Tensor:
    """Return taps ``[channels, W]`` of which the last one alone, that of the token, is not 0."""
    taps = torch.zeros_like(convolution)
    taps[:, -1] = 1
    return taps


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters by the names they have without low-rank differences around them."""
    return {name.replace("inner.", ""): p for name, p in module.named_parameters()}
