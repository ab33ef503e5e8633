"""A stand-in for mixtures of experts, which are not exported."""

from __future__ import annotations

from typing import Any

from torch import nn


class MoE(nn.Module):
    """A mixture of experts, which refuses to be built."""

    def __init__(self, *_: Any) -> None:
        raise ValueError("mixtures of experts are not part of an exported model")
