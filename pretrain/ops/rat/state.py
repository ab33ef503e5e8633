"""What RAT hands from call to call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RATState:
    """The state of RAT after some tokens of N sequences.

    keys, values ``[S, H, D]``: what earlier chunks ended with, rotated, sequence after sequence;
    key, value ``[N, H, D]``: the averages so far in the open chunk; seen ``[N]``: tokens so far (of
    them seen // L chunks have ended).
    """

    keys: Tensor
    values: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor
