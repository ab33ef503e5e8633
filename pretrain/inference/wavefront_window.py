"""A window of unfinished positions in a model with a loop, and the states at its borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.model.block import Block, FirstValues
from pretrain.model.block_states import StateOwner
from pretrain.model.language_model import LanguageModel
from pretrain.model.recursion import Recursion
from pretrain.nn.mixers import State


def sections(model: LanguageModel) -> tuple[range, range, range]:
    """Return the numbers of a looped model's blocks before, in and after the loop."""
    config, count = cast(Recursion, model.recursion).config, len(model.blocks)
    loop = range(config.prelude, count - config.coda)
    return range(loop.start), loop, range(loop.stop, count)


def of_row(model: LanguageModel, states: Sequence[State], row: int) -> list[State]:
    """Return those of one row among the states of several, one for each block."""
    chosen = torch.tensor([row], device=next(model.parameters()).device)
    owners = _owners(model)
    return [owner.select_state(state, chosen) for owner, state in zip(owners, states, strict=True)]


class Window:
    """The windows of some rows, packed, and the states of all blocks before and behind them."""

    def __init__(
        self,
        model: LanguageModel,
        tokens: Sequence[Sequence[int]],
        caches: Sequence[list[State]],
    ) -> None:
        """Embed the windows' tokens; ``caches`` are each row's states before its window."""
        self._model, self._tokens, self._caches = model, tokens, caches
        self._sections, self._owners = sections(model), _owners(model)
        self.lengths = [len(row) for row in tokens]
        device = next(model.parameters()).device
        self._sequences = Sequences.from_lengths(self.lengths, device)
        self._firsts: dict[str, FirstValues] = {}
        packed = torch.tensor([[token for row in tokens for token in row]], device=device)
        self.embedded = model.embed(packed, self._firsts)
        self._before = [
            states[0] if len(states) == 1 else owner.join_states(states)
            for owner, states in zip(self._owners, zip(*caches, strict=True), strict=True)
        ]
        self._after: dict[int, State] = {}

    def run(self, x: Tensor, blocks: range) -> Tensor:
        """Run x ``[T, 1, d]`` through some blocks, from the states before the window."""
        after: list[State] = []
        before = [self._before[index] for index in blocks]
        x = self._model.run_blocks(
            x, blocks, self._sequences, states=before, after=after, firsts=self._firsts
        )
        self._after.update(zip(blocks, after, strict=True))
        return x

    def behind(
        self, counts: Sequence[int], entering: Tensor, hidden: Tensor
    ) -> tuple[list[list[State]], int]:
        """Return each row's states behind the first ``counts`` positions of its window.

        A recurrent layer's are known behind the whole window alone. Where less of it is asked for,
        the blocks run once more on that, from what entered the last pass and the coda, ``[T, 1,
        d]``: the second number is how many positions did.
        """
        states = [self._after[index] for index in range(len(self._owners))]
        cut = all(map(_can_be_cut, self._owners, states))
        rows = list(enumerate(zip(counts, self.lengths, strict=True)))
        short = [] if cut else [row for row, (count, length) in rows if 0 < count < length]
        again = self._again(short, counts, entering, hidden) if short else []
        found: list[list[State]] = []
        for row, (count, length) in rows:
            if count == 0:
                found.append(self._caches[row])
            elif row in short:
                found.append(again[short.index(row)])
            else:
                own = of_row(self._model, states, row)
                found.append([_without_last(state, length - count) for state in own])
        return found, sum(counts[row] for row in short)

    def _again(
        self, rows: Sequence[int], counts: Sequence[int], entering: Tensor, hidden: Tensor
    ) -> list[list[State]]:
        prefix = Window(
            self._model,
            [self._tokens[row][: counts[row]] for row in rows],
            [self._caches[row] for row in rows],
        )
        prelude, loop, coda = self._sections
        prefix.run(prefix.embedded, prelude)
        for x, blocks in ((entering, loop), (hidden, coda)):
            pieces = x.split(self.lengths)
            prefix.run(torch.cat([pieces[row][: counts[row]] for row in rows]), blocks)
        states = [prefix._after[index] for index in range(len(self._owners))]
        return [of_row(self._model, states, place) for place in range(len(rows))]


def _owners(model: LanguageModel) -> list[StateOwner]:
    return [cast(Block, block).states for block in model.blocks]


def _can_be_cut(owner: StateOwner, state: State) -> bool:
    """Return whether a state is but what each token has added to it."""
    return set(state) == {*owner.growing_states, "lengths", "seen"}


def _without_last(state: State, count: int) -> State:
    """Return one sequence's state as it was ``count`` tokens before."""
    if count == 0:
        return state
    counters = ("lengths", "seen")
    return {
        name: value - count if name in counters else value[: len(value) - count]
        for name, value in state.items()
    }
