"""A mixer alone in float64, and gradients of two forms of it side by side."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.nn.mixers import LayerContext, registry
from pretrain.nn.parameters import fill_parameters
from pretrain.parallel.context import current_context
from tests.helpers.relative_error import relative_error


def small_layer(name: str, hidden_size: int, **settings: Any) -> Any:
    """Return a mixer with random parameters."""
    kind = registry()[name]
    config = kind.config_class(**settings).resolve(hidden_size)
    kind.check(config, hidden_size)
    layer = kind(config, LayerContext(hidden_size, 0.3, 0.3, current_context(torch.float64)))
    fill_parameters(layer, seed=1)
    return layer


def largest_error(found, expected, leaves) -> float:
    """Return the largest relative error of two outputs and of all their gradients."""
    weights = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(7), dtype=expected.dtype
    )
    errors = [relative_error(found, expected)]
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        errors.append(relative_error(one, other))
    return max(errors)
