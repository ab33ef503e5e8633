"""What a teacher said of tokens, as it is kept on disk: its likeliest ids."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TeacherTop:
    """A teacher's likeliest ids of N tokens, and what it leaves to all other ids.

    Attributes:
        ids: ``[N, k]`` integers, of the full vocabulary, each once for a token.
        log_probs: ``[N, k]``, at the temperature of the loss.
        log_rest: ``[N]``, the log of the probability of all others; minus infinity for none.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
