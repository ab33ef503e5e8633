"""Self-speculation: a loop's first passes draft tokens, all passes check them together.

The weights of a tied loop are those of its first passes too, and so are the states: a draft needs
no other model and no cache of its own. What is accepted is what greedy decoding would have chosen
(arXiv 2211.17192, at temperature 0).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.model.block import Block
from pretrain.model.language_model import LanguageModel
from pretrain.model.recursion import Recursion
from pretrain.nn.mixers import State


@dataclass(frozen=True)
class Speculation:
    """How many tokens are drafted before they are checked, and the passes of a draft."""

    tokens: int
    passes: int = 1

    @classmethod
    def parse(cls, text: str) -> Speculation:
        """Read ``TOKENS`` or ``TOKENS:PASSES``. Raises UserError for what is neither."""
        tokens, colon, passes = text.partition(":")
        numbers = (tokens, passes) if colon else (tokens, "1")
        if not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise UserError(
                f"speculate is '{text}', expected TOKENS or TOKENS:PASSES, whole numbers from 1"
            )
        return cls(*map(int, numbers))

    def check(self, model: LanguageModel) -> None:
        """Raise UserError unless the model has a loop with more passes than a draft's."""
        if model.recursion is None:
            raise UserError(
                f"speculate is {self}, but the model has no loop, whose first passes would draft"
            )
        if model.recursion.config.step_signal == "coordinate":
            raise UserError(
                f"speculate is {self}, but the model's passes add coordinates "
                "(model.recursion.step_signal), which drafts have no form of"
            )
        times = model.recursion.times or model.recursion.config.times
        if self.passes >= times:
            raise UserError(
                f"speculate is {self}, but the loop makes {times} passes; expected fewer in drafts"
            )

    def __str__(self) -> str:
        return f"{self.tokens}:{self.passes}"


@dataclass
class Drafts:
    """What became of drafts: how many tokens were made and accepted, in how many checks."""

    made: int = 0
    accepted: int = 0
    checks: int = 0

    def __str__(self) -> str:
        if not self.made:
            return "no token was drafted"
        share, each = self.accepted / self.made, 1 + self.accepted / self.checks
        return (
            f"{self.accepted} of {self.made} drafted tokens accepted ({share:.0%}), "
            f"{each:.2f} tokens a check"
        )


@torch.no_grad()
def speculate(
    model: LanguageModel,
    prompt: list[int],
    speculation: Speculation,
    *,
    max_tokens: int,
    vocab_size: int,
    stop_ids: Collection[int] = (),
    drafts: Drafts | None = None,
) -> Iterator[int]:
    """Yield the ids that :func:`.generate` does at temperature 0, which see for the arguments.

    ``drafts`` counts what was drafted. Raises UserError for a model that cannot.
    """
    speculation.check(model)
    drafts = Drafts() if drafts is None else drafts
    was_training = model.training
    model.eval()
    writer = _Writer(model, vocab_size)
    try:
        left, new = max_tokens, writer.begin(prompt) if max_tokens else []
        while new:
            for token in new[:left]:
                if token in stop_ids:
                    return
                yield token
            left -= len(new)
            if left <= 0:
                return
            count = min(speculation.tokens, left - 1)
            new = writer.go_on(count, speculation.passes)
            drafts.made += count
            drafts.accepted += len(new) - 1
            drafts.checks += 1
    finally:
        model.train(was_training)


class _Writer:
    """A text so far: its last token, and the states behind those before it."""

    def __init__(self, model: LanguageModel, candidates: int) -> None:
        self._model, self._candidates = model, candidates
        self._states: list[State] = []
        self._last = 0

    def begin(self, prompt: Sequence[int]) -> list[int]:
        """Read the prompt and return the first token after it."""
        x, self._states = self._read(prompt, None)
        (self._last,) = self._likeliest(x[-1:])
        return [self._last]

    def go_on(self, count: int, passes: int) -> list[int]:
        """Return the next tokens, one at least: as many of ``count`` drafted ones as are right."""
        drafted = self._draft(count, passes)
        x, after = self._read([self._last, *drafted], self._states)
        found = self._likeliest(x)
        right = 0
        while right < count and found[right] == drafted[right]:
            right += 1
        if right < count:
            after = self._without(after, count - right, drafted[:right])
        self._states, self._last = after, found[right]
        return found[: right + 1]

    def _draft(self, count: int, passes: int) -> list[int]:
        recursion, loop = cast(Recursion, self._model.recursion), self._model.loop
        times, size = recursion.num_passes(), len(loop)
        # The first passes read the states of the first passes, which deeper ones do not change.
        behind = loop.start + times * size
        states = [*self._states[: loop.start + passes * size], *self._states[behind:]]
        drafted, configured = [self._last], recursion.times
        recursion.times = passes
        try:
            for _ in range(count):
                x, states = self._read(drafted[-1:], states)
                drafted += self._likeliest(x)
        finally:
            recursion.times = configured
        return drafted[1:]

    def _without(self, after: list[State], wrong: int, right: Sequence[int]) -> list[State]:
        """Return the states behind the tokens that stay: ``after`` has ``wrong`` more."""
        shorter = [
            cast(Block, self._model.blocks[index]).states.shortened_state(state, wrong)
            for index, state in zip(self._model.blocks_by_state(), after, strict=True)
        ]
        if all(state is not None for state in shorter):
            return cast(list[State], shorter)
        # A recurrent state cannot go back: the tokens are read again.
        return self._read([self._last, *right], self._states)[1]

    def _read(
        self, tokens: Sequence[int], states: list[State] | None
    ) -> tuple[Tensor, list[State]]:
        device = next(self._model.parameters()).device
        return self._model.hidden_with_state(torch.tensor([[*tokens]], device=device), states)

    def _likeliest(self, x: Tensor) -> list[int]:
        logits = self._model.next_logits(x)[:, : self._candidates]
        found: list[int] = logits.float().argmax(-1).tolist()
        return found
