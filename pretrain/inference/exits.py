"""When a token leaves the loop of a recursive model: the criteria, and who has to make more passes.

The criteria are those of recurrent depth (arXiv 2502.05171). The value after pass i compares the
token's state, or the distribution of the next token that its head would give, with that of pass
i - 1; before the first pass the state is the fresh one and the distribution uniform.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pretrain.common.config_loader import nearest
from pretrain.common.errors import UserError
from pretrain.nn.mixers.base import accumulation_dtype

CACHES = ("latest", "shared")
_LIKELY = 0.1  # of the largest probability
_FIRST_ENTROPY = 100.0  # of no distribution: no first pass is near it
# By criterion: its threshold where none is given.
CRITERIA = {
    "latent": 0.03,
    "cosine": 1e-3,
    "kl": 1e-3,
    "likely-kl": 1e-5,
    "entropy": 1e-3,
    "argmax": 5.0,
}
_OF_STATES = ("latent", "cosine")


@dataclass(frozen=True)
class ExitRule:
    """When a token makes no more passes, and what later tokens see of it then.

    Attributes:
        criterion: A name of ``CRITERIA``.
        threshold: What the criterion's value must be below; for ``argmax``, how many passes in a
            row must have the same likeliest token.
        min_passes: The first pass after which it is looked at.
        every: It is looked at after each so many passes.
        cache: ``latest``: to later tokens, the token's last pass stands for all deeper ones;
            ``shared``: for all passes, of which one is kept.
    """

    criterion: str
    threshold: float
    min_passes: int = 1
    every: int = 1
    cache: Literal["latest", "shared"] = "latest"

    @classmethod
    def parse(
        cls, text: str, *, min_passes: int | None = None, every: int | None = None, cache: str = ""
    ) -> ExitRule:
        """Read ``NAME`` or ``NAME:THRESHOLD``. Raises UserError for what is no rule."""
        name, colon, value = text.partition(":")
        if name not in CRITERIA:
            raise UserError(
                f"exit is '{text}', whose criterion is unknown{nearest(name, list(CRITERIA))}; "
                f"expected NAME or NAME:THRESHOLD with one of {', '.join(CRITERIA)}"
            )
        expected = "a whole number from 1" if name == "argmax" else "a number from 0"
        try:
            threshold = float(value) if colon else CRITERIA[name]
        except ValueError:
            threshold = math.nan
        whole = name != "argmax" or (threshold >= 1 and threshold == threshold // 1)
        if not (threshold >= 0 and whole):
            raise UserError(f"exit is '{text}', expected {expected} after '{name}:'")
        for option, number in (("min_passes", min_passes), ("exit_every", every)):
            if number is not None and number < 1:
                raise UserError(f"{option} is {number}, expected at least 1")
        if cache == "full":
            raise UserError(
                "exit_cache is full, with which deep passes would see hardly any token once "
                f"tokens exit, expected {' or '.join(CACHES)}"
            )
        if cache not in ("", *CACHES):
            raise UserError(f"exit_cache is '{cache}', expected {' or '.join(CACHES)}")
        kept: Literal["latest", "shared"] = "shared" if cache == "shared" else "latest"
        return cls(name, threshold, min_passes or 1, every or 1, kept)

    def __str__(self) -> str:
        return f"{self.criterion}:{self.threshold:g}"

    @property
    def reads_outputs(self) -> bool:
        """Return whether coda and head are needed at every pass, not at the last one alone."""
        return self.criterion not in _OF_STATES

    def looks_after(self, number: int, times: int) -> bool:
        """Return whether a token may leave after pass ``number`` of ``times``, from 1."""
        late = number - self.min_passes
        return number < times and late >= 0 and late % self.every == 0


class Watch:
    """The criterion's memory of the tokens of one call that still run, in their order."""

    def __init__(self, rule: ExitRule, times: int) -> None:
        self.rule, self.times = rule, times
        self._last: Tensor | None = None  # log-probabilities, or the likeliest token
        self._row: Tensor | None = None  # passes in a row with the same likeliest token

    def needs_outputs(self, number: int) -> bool:
        """Return whether the distribution after pass ``number`` is read."""
        if not self.rule.reads_outputs or number >= self.times:
            return False
        if self.rule.criterion == "argmax":
            return True
        return any(self.rule.looks_after(n, self.times) for n in (number, number + 1))

    def fires(
        self, number: int, before: Tensor, after: Tensor, outputs: Callable[[], Tensor]
    ) -> Tensor:
        """Return which tokens leave after pass ``number``, from states ``[N, d]`` around it.

        ``outputs`` returns the logits ``[N, vocab]`` after it.
        """
        looks = self.rule.looks_after(number, self.times)
        found = torch.zeros(len(after), dtype=torch.bool, device=after.device)
        if not self.rule.reads_outputs:
            if not looks:
                return found
            return change(self.rule.criterion, before, after) < self.rule.threshold
        if not self.needs_outputs(number):
            self._last = None
            return found
        logits = outputs()
        logits = logits.to(accumulation_dtype(logits.dtype))
        if self.rule.criterion == "argmax":
            return self._in_a_row(logits.argmax(-1)) >= self.rule.threshold if looks else found
        log_p, last = logits.log_softmax(-1), self._last
        self._last = log_p
        if not looks:
            return found
        return divergence(self.rule.criterion, last, log_p) < self.rule.threshold

    def _in_a_row(self, likeliest: Tensor) -> Tensor:
        if self._last is None or self._row is None:
            self._row = torch.ones_like(likeliest)
        else:
            self._row = torch.where(likeliest == self._last, self._row + 1, 1)
        self._last = likeliest
        return self._row

    def keep(self, stays: Tensor) -> None:
        """Forget the tokens that ``stays`` ``[N]`` does not name."""
        self._last = None if self._last is None else self._last[stays]
        self._row = None if self._row is None else self._row[stays]


def change(criterion: str, before: Tensor, after: Tensor) -> Tensor:
    """Return how much states ``[N, d]`` have changed."""
    wide = accumulation_dtype(after.dtype)
    before, after = before.to(wide), after.to(wide)
    if criterion == "latent":
        smallest = torch.finfo(wide).tiny
        return (after - before).norm(dim=-1) / after.norm(dim=-1).clamp_min(smallest)
    return (1 - torch.nn.functional.cosine_similarity(after, before, dim=-1)).clamp_min(0)


def divergence(criterion: str, last: Tensor | None, log_p: Tensor) -> Tensor:
    """Return the value of a criterion of distributions, from log-probabilities ``[N, vocab]``.

    ``last`` is None before the first pass.
    """
    if criterion == "entropy":
        now = -(log_p.exp() * log_p).sum(-1)
        if last is None:
            return (now - _FIRST_ENTROPY).abs()
        return (now + (last.exp() * last).sum(-1)).abs()
    if last is None:
        last = torch.full_like(log_p, -math.log(log_p.shape[-1]))
    if criterion == "likely-kl":
        last, log_p = _likely(last), _likely(log_p)
    # Rounding may take it below 0, where it would be below any threshold.
    return (last.exp() * (last - log_p)).sum(-1).clamp_min(0)


def _likely(log_p: Tensor) -> Tensor:
    """Return log-probabilities where all unlikely tokens are alike."""
    unlikely = log_p < log_p.amax(-1, keepdim=True) + math.log(_LIKELY)
    return log_p.masked_fill(unlikely, -math.log(log_p.shape[-1])).log_softmax(-1)
