"""A layer in float64 against its equations written out as a loop over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.nn.mixers import LayerContext, registry
from pretrain.nn.parameters import fill_parameters
from pretrain.parallel.context import current_context
from tests.helpers.relative_error import relative_error

LENGTHS = [5, 1, 17, 9]


def build(name: str, hidden: int, context: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Return a layer in float64; ``context``: which of a model's it is."""
    kind = registry()[name]
    config = kind.config_class(**settings).resolve(hidden)
    parallel = current_context(torch.float64)
    layer = kind(config, LayerContext(hidden, 0.3, 0.3, parallel, **context or {}))
    fill_parameters(layer, seed=1)
    return layer


def moved(layer: Any, size: float = 0.3) -> Any:
    """Add noise to every parameter, so that none is 0 or the same for all channels."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += size * noise
    return layer


def check_equations(
    layer: Any,
    hidden: int,
    definition: Callable[[Any, Tensor], Tensor],
    bound: float = 1e-10,
    run: Callable[..., tuple[Tensor, Any]] | None = None,
) -> None:
    """Compare a layer with ``definition(layer, x)`` of one sequence, x ``[T, hidden]``.

    Outputs and all gradients over packed documents, and outputs where the state is handed over.
    ``run``: what calls the layer, if it takes more than x, sequences and a state.
    """
    run = run or layer
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(LENGTHS), hidden, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    found, _ = run(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = torch.cat([definition(layer, part) for part in x.split(LENGTHS)])
    assert relative_error(found[:, 0], expected) < bound
    leaves = [x, *layer.parameters()]
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found[:, 0] * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        assert float(other.norm()) > 0
        assert relative_error(one, other) < 100 * bound
    longest = x.split(LENGTHS)[2][:, None]
    first, state = run(longest[:7])
    second, _ = run(longest[7:], state=state)
    whole = definition(layer, longest[:, 0])
    assert relative_error(torch.cat([first, second])[:, 0], whole) < bound
