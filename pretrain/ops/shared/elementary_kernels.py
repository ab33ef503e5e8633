"""Elementary functions for kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x, APPROXIMATE: tl.constexpr):
    """Compute tanh by the hardware's instruction or by the exponential.

    The instruction has relative error 2^-11, below bfloat16's rounding; where the exponential would
    cancel, the series is used.
    """
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    square = x * x
    small = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.05, small, tl.where(x < 0.0, -large, large))


@triton.jit
def sigmoid(x):
    """Compute the sigmoid, never by the hardware's tanh.

    Near 0 and 1 the error of tanh is that of the difference to them, which is all that a gate of
    long memory has.
    """
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, tl.full(x.shape, 1.0, x.dtype)) / (1.0 + e)
