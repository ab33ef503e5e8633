"""Elementary functions for kernels.

Compiled kernels take float32 to the hardware's approximations of 2^x, 1/x and log2 x (PTX ISA:
relative errors of 2^-22.5, 2^-23 and an absolute one of 2^-22 near 1), without the scaling of
denormal numbers: a sigmoid is four instructions. What triton makes of ``tl.exp`` and a division is
three times as long. In float64, and in the interpreter, plain formulas stand.
"""

from __future__ import annotations

import triton
import triton.language as tl

_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)

_SIGMOID = tl.constexpr("""{
.reg .f32 e;
mul.ftz.f32 e, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 e, e;
add.ftz.f32 e, e, 0f3F800000;
rcp.approx.ftz.f32 $0, e;
}""")
_EXP = tl.constexpr("""{
.reg .f32 e;
mul.ftz.f32 e, $1, 0f3FB8AA3B;
ex2.approx.ftz.f32 $0, e;
}""")
_LOG = tl.constexpr("""{
.reg .f32 e;
lg2.approx.ftz.f32 e, $1;
mul.ftz.f32 $0, e, 0f3F317218;
}""")


@triton.jit
def _assembly(code: tl.constexpr, x):
    return tl.inline_asm_elementwise(code, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh(x, APPROXIMATE: tl.constexpr):
    """Compute tanh by the hardware's instruction or by the exponential.

    The instruction has relative error 2^-11, below bfloat16's rounding; where the exponential would
    cancel, the series is used.
    """
    if APPROXIMATE:
        return _assembly("tanh.approx.f32 $0, $1;", x)
    e = exp(-2.0 * tl.abs(x))
    large = divide(1.0 - e, 1.0 + e)
    square = x * x
    small = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.05, small, tl.where(x < 0.0, -large, large))


@triton.jit
def sigmoid(x):
    """Compute the sigmoid, never by the hardware's tanh.

    Near 0 and 1 the error of tanh is that of the difference to them, which is all that a gate of
    long memory has. Of 1 - sigmoid(x) a float32 of either form keeps 1.2e-7.
    """
    if _COMPILED:
        if x.dtype == tl.float32:
            return _assembly(_SIGMOID, x)
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, tl.full(x.shape, 1.0, x.dtype)) / (1.0 + e)


@triton.jit
def exp(x):
    """Compute e^x; what is below 2^-126 is 0 in compiled float32."""
    if _COMPILED:
        if x.dtype == tl.float32:
            return _assembly(_EXP, x)
    return tl.exp(x)


@triton.jit
def log(x):
    """Compute the natural logarithm of a positive number."""
    if _COMPILED:
        if x.dtype == tl.float32:
            return _assembly(_LOG, x)
    return tl.log(x)


@triton.jit
def divide(a, b):
    """Compute ``a / b``, of which b's inverse must be a normal number."""
    if _COMPILED:
        if b.dtype == tl.float32:
            return a * _assembly("rcp.approx.ftz.f32 $0, $1;", b)
    return a / b
