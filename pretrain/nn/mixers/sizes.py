"""Sizes of mixers that follow the model's width.

A head's width is the customary one of its kind, or a quarter of the model's width where that is
less, so that small models have about four heads too.
"""

from __future__ import annotations

import math


def split_width(
    width: int, head_dim: int, *, even: bool = False, multiple_of: int = 1
) -> tuple[int, int]:
    """Return (num_heads, channels of a head) of which ``width`` is the product.

    Of all divisors, the one whose heads are nearest in ratio to ``head_dim`` or a quarter of
    ``width``, whichever is less. ``even``: heads of an even number of channels, as rotary positions
    need, even if the product is then a little more than ``width``. ``multiple_of``: of the number
    of heads; ignored where no divisor is one.
    """
    wanted = max(min(head_dim, width / 4), 1)
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    fitting = [n for n in divisors if not even or width // n % 2 == 0]
    if not fitting:
        return multiple_of, 2 * math.ceil(width / (2 * multiple_of))
    fitting = [n for n in fitting if n % multiple_of == 0] or fitting
    num_heads = min(fitting, key=lambda n: abs(math.log(width / n / wanted)))
    return num_heads, width // num_heads


def power_of_two_width(hidden_size: int, most: int) -> int:
    """Return the largest power of two that is at most ``most`` and a quarter of the width."""
    return int(2 ** (max(min(most, hidden_size // 4), 1).bit_length() - 1))


def heads_for(width: float, head_dim: int, multiple_of: int = 1) -> int:
    """Return the number of heads whose widths add up to about ``width``, at least one."""
    return max(math.floor(width / head_dim / multiple_of + 0.5), 1) * multiple_of


def attention_heads(
    hidden_size: int, num_heads: int | None, head_dim: int | None, groups: int | None
) -> tuple[int, int]:
    """Return (num_heads, head_dim) of attention with those that are None filled in.

    Heads have 64 channels, 128 from a width of 2048, and are shared by ``groups``. Raises
    ValueError where heads do not divide the width.
    """
    if num_heads is not None:
        return num_heads, head_dim or per_head(hidden_size, num_heads)
    if head_dim is not None:
        return heads_for(hidden_size, head_dim, groups or 1), head_dim
    usual = 64 if hidden_size < 2048 else 128
    return split_width(hidden_size, usual, even=True, multiple_of=groups or 1)


def delta_rule_sizes(
    hidden_size: int, num_heads: int | None, head_dim: int | None, share: float, widest: int
) -> tuple[int, int]:
    """Return (num_heads, head_dim) of a delta rule with those that are None filled in.

    Keys have a power of two of channels, at most ``widest``, and are together ``share`` times as
    wide as the model.
    """
    if head_dim is None:
        widest_wanted = 4 * share * hidden_size / num_heads if num_heads else hidden_size
        head_dim = power_of_two_width(int(widest_wanted), widest)
    return num_heads or heads_for(share * hidden_size, head_dim), head_dim


def few_heads(hidden_size: int, num_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """Return (num_heads, head_dim) with those that are None filled in: four heads, or fewer.

    Fewer are taken where four do not divide the width. Raises ValueError where heads do not divide
    it.
    """
    if num_heads is None:
        fewer = max(n for n in range(1, 5) if hidden_size % n == 0)
        num_heads = fewer if head_dim is None else heads_for(hidden_size, head_dim)
    return num_heads, head_dim or per_head(hidden_size, num_heads)


def integral(value: float, what: str) -> int:
    """Return ``value`` as an int. Raises ValueError naming ``what`` if it is not whole."""
    if abs(value - round(value)) > 1e-9 * abs(value):
        raise ValueError(f"{what} is {value:g}, expected a whole number")
    return round(value)


def per_head(hidden_size: int, num_heads: int) -> int:
    """Return the channels of a head. Raises ValueError where heads do not divide the width."""
    if hidden_size % num_heads:
        raise ValueError(
            f"num_heads is {num_heads}, which does not divide hidden_size {hidden_size}; choose "
            "another or set head_dim"
        )
    return hidden_size // num_heads
