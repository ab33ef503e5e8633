"""A stand-in for mixtures of experts in models that have none."""

from __future__ import annotations

from typing import Any

from torch import nn


class MoE(nn.Module):
    """A mixture of experts that refuses to be built."""

    def __init__(self, *_: Any) -> None:
        raise ValueError("the exported model has no mixture of experts")
