"""The state that RAT passes from call to call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RATState:
    """The state of RAT after some tokens of N sequences.

    Attributes:
        keys: ``[S, H, D]`` that earlier chunks ended with, rotated, sequence after sequence.
        values: ``[S, H, D]``, likewise.
        key: ``[N, H, D]`` average so far in the open chunk.
        value: ``[N, H, D]``, likewise.
        seen: ``[N]`` tokens so far, of which seen // L chunks have ended.
    """

    keys: Tensor
    values: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor
