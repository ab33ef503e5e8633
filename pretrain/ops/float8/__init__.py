"""Matrix products of projections in float8."""

from pretrain.ops.float8.products import (
    Float8,
    cast_gradient,
    float8_linear,
    input_gradient,
    output,
    weight_gradient,
)
from pretrain.ops.float8.requirements import check_float8

__all__ = [
    "Float8",
    "cast_gradient",
    "check_float8",
    "float8_linear",
    "input_gradient",
    "output",
    "weight_gradient",
]
