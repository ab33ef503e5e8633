"""Settings of the wavefront sampler, and which positions of a window become final after a step.

Two rules: ours, by which the longest settled prefix of the window leaves it, and the published one
(arXiv 2510.14961, with what its code does beyond the paper), for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.nn.mixers import State

Criterion = Literal["latent", "token", "fixed"]
_STEADY = 3  # steps that a token must stay the same by our rule, unless told


@dataclass(frozen=True)
class Wavefront:
    """How a model with recurrent depth generates several tokens at once.

    Attributes:
        wavefront: The most unfinished positions at a time.
        inner: Passes of all of them in a step, between two looks at their tokens.
        headway: Positions that a step adds; the tokens of all but one are guesses.
        criterion: What ends a position's passes before the model's number of them: a ``latent``
            difference between two steps below ``eps``, the same ``token`` for ``steady`` steps, or
            nothing (``fixed``).
        eps: The relative difference.
        steady: Steps; None: 3, as published the passes divided by ``inner``.
        ema: Share of the last step's embedding that stays in a position's.
        noise: Share of fresh noise in a state before each step.
        dampened: Whether that share is divided by 1 + the position's passes.
        published: The published rule, by which a settled position takes all before it along and
            stays in the window itself, and nothing limits the passes.
    """

    wavefront: int = 128
    inner: int = 4
    headway: int = 1
    criterion: Criterion = "latent"
    eps: float = 0.03
    steady: int | None = None
    ema: float = 0.1
    noise: float = 0.5
    dampened: bool = True
    published: bool = False

    def check(self, prefix: str = "") -> None:
        """Raise UserError for a setting out of its range; ``prefix`` goes before its name."""
        for name in ("wavefront", "inner", "headway", "steady"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{prefix}{name} is {value}, expected at least 1")
        if self.criterion not in get_args(Criterion):
            known = ", ".join(get_args(Criterion))
            raise UserError(f"{prefix}criterion is {self.criterion!r}, expected one of {known}")
        if not 0 <= self.eps < math.inf:
            raise UserError(f"{prefix}eps is {self.eps}, expected 0 or more")
        if not 0 <= self.ema < 1:
            raise UserError(f"{prefix}ema is {self.ema}, expected at least 0 and below 1")
        if not 0 <= self.noise <= 1:
            raise UserError(f"{prefix}noise is {self.noise}, expected 0 to 1")
        if self.published and self.wavefront < 2:
            raise UserError(
                f"{prefix}wavefront is {self.wavefront}, expected at least 2 with the published "
                "rule, by which the last final position stays in the window"
            )
        if self.headway > self.wavefront:
            raise UserError(
                f"{prefix}headway is {self.headway}, expected at most wavefront = {self.wavefront}"
            )


@dataclass
class Row:
    """A sequence that is being generated: what is final of it, and its window.

    Attributes:
        cache: Each block's state behind the tokens before the window; of blocks in the loop that of
            the last pass.
        start: The position where the window begins.
        tokens: What is in the window; the first one is final.
        states: The loop's, ``[M, d]``, of the first M of them. Later ones are new.
        passes: How many each of these has made.
        since: How many of them with the token that the position has now.
        noise: What fresh states are drawn from.
        text: The final tokens after the prompt.
        depths: The passes by which each of them was made.
        same: Of each position in the window, the steps for which its token stayed the same.
        made: What the positions of the window made of their states in the last step.
        embedded: The loop's inputs in the last step ``[N, d]``, and the position of the first.
        shift: By how many positions the window has moved in the last step; None: none was made.
        steps: The steps so far.
        stopped: Whether a token has ended the text.
    """

    cache: list[State]
    start: int
    tokens: list[int]
    states: Tensor
    noise: torch.Generator
    passes: list[int] = field(default_factory=list)
    since: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    same: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    embedded: tuple[Tensor, int] | None = None
    shift: int | None = None
    steps: int = 0
    stopped: bool = False

    def open_new(self) -> None:
        """Let the positions that have no state yet begin."""
        for counts in (self.passes, self.since):
            counts += [0] * (len(self.tokens) - len(counts))

    def count(self, passes: int) -> None:
        """Add the passes that all positions have made in a step."""
        self.passes = [made + passes for made in self.passes]
        self.since = [made + passes for made in self.since]

    def smoothed(self, embedded: Tensor, config: Wavefront) -> Tensor:
        """Return the loop's inputs ``[N, d]`` mixed with those of the last step."""
        if config.ema == 0:
            return embedded
        mixed = embedded.clone()
        if self.embedded is not None:
            old, start = self.embedded
            old = old[self.start - start :][: len(mixed)]
            mixed[: len(old)] = (1 - config.ema) * embedded[: len(old)] + config.ema * old
            if config.published:  # whose code makes new positions smaller
                mixed[len(old) :] *= 1 - config.ema
        self.embedded = (mixed, self.start)
        return mixed

    def noisy(self, states: Tensor, std: float, config: Wavefront) -> Tensor:
        """Return states ``[N, d]`` mixed with fresh noise of standard deviation ``std``."""
        if config.noise == 0:
            return states
        drawn = torch.randn(states.shape, generator=self.noise).clamp_(-3, 3) * std
        made = torch.tensor(self.passes, dtype=torch.float64)
        share = (
            config.noise / (1 + made) if config.dampened else torch.full_like(made, config.noise)
        )
        share = share[:, None].to(states)
        return (1 - share) * states + share * drawn.to(states)

    def leaving(
        self, before: Tensor, after: Tensor, made: list[int], limit: int, config: Wavefront
    ) -> int:
        """Return how many positions at the window's beginning are final after this step.

        Their states ``[N, d]`` were ``before`` it and are ``after``; ``made`` are the tokens that
        follow by them, and ``limit`` the passes of the model.
        """
        self.steps += 1
        rule = self._published if config.published else self._prefix
        found = rule(before, after, made, limit, config)
        self.made, self.same = made[found:], self.same[found:]
        return found

    def _prefix(
        self, before: Tensor, after: Tensor, made: list[int], limit: int, config: Wavefront
    ) -> int:
        # A position only leaves with the token that its state was computed with.
        stays = next((i for i in range(1, len(made)) if self.tokens[i] != made[i - 1]), len(made))
        old = [*self.made, *[-1] * (len(made) - len(self.made))]
        same = [*self.same, *[0] * (len(made) - len(self.same))]
        pairs = zip(same, old, made, strict=True)
        self.same = [n + 1 if a == b else 0 for n, a, b in pairs]
        settled = [passes >= limit for passes in self.since]
        if config.criterion == "latent":
            near = differences(after, before) < config.eps
            settled = [a or b for a, b in zip(settled, near.tolist(), strict=True)]
        elif config.criterion == "token":
            steady = config.steady or _STEADY
            settled = [a or n >= steady for a, n in zip(settled, self.same, strict=True)]
        return min(stays, next((i for i, ends in enumerate(settled) if not ends), len(made)))

    def _published(
        self, before: Tensor, after: Tensor, made: list[int], limit: int, config: Wavefront
    ) -> int:
        steps = config.steady or limit // config.inner
        if config.criterion == "fixed":
            return min(config.headway, len(made)) if self.steps - 1 > steps else 0
        if config.criterion == "token":
            count = [*self.same, *[0] * (len(made) - len(self.same))]
            edits = [self.tokens[0], *made[:-1]]
            triples = zip(count, self.tokens, edits, strict=True)
            self.same = [n + (a == b) for n, a, b in triples]
            return max((i for i, n in enumerate(self.same) if n > steps), default=0)
        if self.shift is None:
            return 0
        # The published code compares with the state of the position as much later as the window
        # has moved.
        old = before[self.shift :]
        near = (differences(after[: len(old)], old) < config.eps).nonzero()
        return int(near[-1]) if len(near) else 0


def differences(states: Tensor, earlier: Tensor) -> Tensor:
    """Return the norms ``[N]`` of what has changed in states ``[N, d]``, relative to theirs."""
    return (states - earlier).norm(dim=-1) / states.norm(dim=-1)


def advance(
    row: Row, count: int, made: list[int], config: Wavefront, guess: Callable[[], int]
) -> None:
    """Move the window by ``count`` positions, to the tokens that its states have made."""
    old = row.tokens[count:]
    kept = [] if count else row.tokens[:1]
    row.tokens = [*kept, *made[max(count - 1, 0) :]]
    row.tokens += [guess() for _ in range(config.headway - 1)]
    row.tokens = row.tokens[: config.wavefront]
    length = len(row.tokens)
    row.states, row.passes = row.states[count:][:length], row.passes[count:][:length]
    since = zip(row.since[count:], old, row.tokens, strict=False)
    row.since = [passes if a == b else 0 for passes, a, b in since]
    row.start, row.shift = row.start + count, count
