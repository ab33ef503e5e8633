"""The states that rows of a batch carry on to the next one: truncated back-propagation in time.

Row r of a step reads on where row r of the step before ended (see TrainingBatches), and every layer
goes on from its state there. No gradient goes through it: it is a constant of the step. Sequences
that begin in a row begin without a state.

A process keeps the states of its own rows. All of them have one size: of a window, whose keys are
packed, the rows are padded to the window.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from pretrain.common.config_loader import ConfigError
from pretrain.data.sequences import Sequences, without_waiting
from pretrain.nn.mixers.base import State, accumulation_dtype
from pretrain.parallel.processes import data_parallel_rank_and_size

if TYPE_CHECKING:
    from pretrain.data.batch import Batch
    from pretrain.model.block import Block
    from pretrain.model.block_states import StateOwner
    from pretrain.model.language_model import LanguageModel

Shape = tuple[int, ...]
_NOISE = 3  # which of a step's streams of random numbers, see pretrain.model.recursion


@dataclass(frozen=True)
class _Layer:
    """A block at one pass of a loop, and its states: of each row of all micro-batches, by name."""

    owner: StateOwner
    mixer: str
    block: int
    depth: int
    values: State

    def state_of(self, rows: slice) -> State:
        """Return the state of some rows as the mixer has it."""
        state = {name: value[rows] for name, value in self.values.items()}
        for name in self.owner.windowed_states:
            places = torch.arange(self.owner.state_window, device=state[name].device)
            state[name] = state[name][places < state["lengths"][:, None]]
        return state

    def keep(self, rows: slice, state: State) -> None:
        """Keep the state of some rows."""
        for name, value in state.items():
            kept = self.values[name][rows]
            if name in self.owner.windowed_states:
                places = torch.arange(self.owner.state_window, device=value.device)
                kept.zero_()
                kept[places < state["lengths"][:, None]] = value
            else:
                kept.copy_(value)

    def forget(self) -> None:
        """Begin again from states before any token."""
        count = len(next(iter(self.values.values())))
        for name, value in _initial(self.owner, self.mixer, count).items():
            self.values[name].copy_(value)


class CarriedStates:
    """What this process's rows carry from step to step through one stage of the model.

    ``micro_batches`` of ``rows`` rows each, the same number in every step. ``noise`` is
    ``train.carry_state_noise``.
    """

    def __init__(
        self, model: LanguageModel, micro_batches: int, rows: int, noise: float = 0.0
    ) -> None:
        self._micro_batches, self._rows, self._noise = micro_batches, rows, noise
        self._context = model.context
        self._layers: list[_Layer] = []
        times = None if model.recursion is None else model.recursion.config.times
        passes = Counter[int]()
        for index in model.blocks_by_state(times):
            block = cast("Block", model.blocks[index])
            owner, name = block.states, type(block.mixer).__name__
            values = _initial(owner, name, micro_batches * rows)
            self._layers.append(_Layer(owner, name, index, passes[index], values))
            passes[index] += 1
        self._continues: list[tuple[bool, ...]] = []
        self._seeds, self._rank, self._world_size = (0, 0), 0, 1
        self._entered = 0
        self._lasts: Tensor | None = None

    def begin_step(self, seed: int, step: int, rank: int, world_size: int) -> None:
        """Set what noise is drawn from, on data-parallel rank ``rank`` of ``world_size``."""
        self._seeds, self._rank, self._world_size = (seed, step), rank, world_size

    def expect(self, batches: Sequence[Batch]) -> None:
        """Learn which rows of the step's micro-batches read on.

        Raises ValueError for micro-batches of other rows.
        """
        found = [batch.continues or () for batch in batches]
        if len(found) > self._micro_batches or any(len(rows) != self._rows for rows in found):
            raise ValueError(
                f"rows carry states, so expected {self._micro_batches} micro-batches of "
                f"{self._rows} rows that read on, found {[len(rows) for rows in found]}"
            )
        self._continues, self._entered = found, 0

    def enter(self, sequences: Sequences) -> list[State]:
        """Return what each layer begins the next micro-batch's sequences with."""
        number, self._entered = self._entered, self._entered + 1
        firsts = _first_pieces(sequences, self._rows)
        lasts = [first - 1 for first in (*firsts[1:], sequences.count)]
        begins = [self._rows] * sequences.count  # a state before any token, behind those of rows
        for row, first in enumerate(firsts):
            if self._continues[number][row]:
                begins[first] = row
        chosen, self._lasts = (
            without_waiting(torch.tensor(x, device="cpu"), sequences.device)
            for x in (begins, lasts)
        )
        states = []
        for layer in self._layers:
            kept = self._noisy(layer, layer.state_of(self._slots(number)), number)
            joined = layer.owner.join_states([kept, layer.owner.init_state(1)])
            states.append(layer.owner.select_state(joined, chosen))
        return states

    @torch.no_grad()
    def leave(self, states: Sequence[State]) -> None:
        """Keep the states behind the sequences of the micro-batch that was entered last."""
        assert self._lasts is not None
        rows = self._slots(self._entered - 1)
        for layer, state in zip(self._layers, states, strict=True):
            layer.keep(rows, layer.owner.select_state(state, self._lasts))
        self._lasts = None

    def forget(self) -> None:
        """Have all rows begin again without a state."""
        for layer in self._layers:
            layer.forget()

    def parts(self) -> dict[str, tuple[Shape, list[tuple[Shape, Tensor]]]]:
        """Return the states by the names and places that they have in a checkpoint.

        That is the shape of all rows of the global batch, and (offsets, values) of those of this
        process. Tensor-parallel processes lie one after another: which axis has the heads, and
        whether they share one, is known to the layers alone.
        """
        rank, size = data_parallel_rank_and_size()
        shards, shard = self._context.tensor_size, self._context.tensor_rank
        found = {}
        for layer in self._layers:
            for name, value in layer.values.items():
                inner = value.shape[1:]
                full = (shards, size * len(value), *inner)
                parts = [
                    (
                        (shard, (number * size + rank) * self._rows, *(0 for _ in inner)),
                        value[self._slots(number)][None],
                    )
                    for number in range(self._micro_batches)
                ]
                found[f"carried.{layer.block}.{layer.depth}.{name}"] = full, parts
        return found

    def _slots(self, number: int) -> slice:
        return slice(number * self._rows, (number + 1) * self._rows)

    def _noisy(self, layer: _Layer, state: State, number: int) -> State:
        """Return the state of a micro-batch's rows with noise, which each row draws by itself."""
        if self._noise == 0:
            return state
        exact = {*layer.owner.windowed_states, *layer.owner.exact_states}
        first = (number * self._world_size + self._rank) * self._rows
        found = dict(state)
        for place, name in enumerate(sorted(state)):
            if name not in exact and state[name].is_floating_point():
                rows = [
                    self._with_noise(value, (first + row, layer.block, layer.depth, place))
                    for row, value in enumerate(state[name])
                ]
                found[name] = torch.stack(rows)
        return found

    def _with_noise(self, value: Tensor, site: tuple[int, ...]) -> Tensor:
        drawn = int(np.random.default_rng([*self._seeds, *site, _NOISE]).integers(2**62))
        generator = torch.Generator(value.device).manual_seed(drawn)
        wide = value.to(accumulation_dtype(value.dtype))
        noise = torch.randn(wide.shape, generator=generator, device=wide.device, dtype=wide.dtype)
        return (wide + self._noise * wide.square().mean().sqrt() * noise).to(value.dtype)


def _initial(owner: StateOwner, mixer: str, rows: int) -> State:
    """Return the states of rows before any token, each tensor with memory of its own.

    Raises ConfigError where they are not of one size.
    """
    state = {}
    for name, value in owner.init_state(rows).items():
        if name in owner.windowed_states:
            state[name] = value.new_zeros(rows, owner.state_window, *value.shape[1:])
        elif len(value) == rows:
            state[name] = value.clone()
        else:
            raise ConfigError(
                f"train.carry_state is true, but '{name}' in the state of {mixer} "
                f"is {tuple(value.shape)} for {rows} sequences; expected one entry for each, or "
                "windowed_states that name it (docs/add-a-layer.md)"
            )
    return state


def _first_pieces(sequences: Sequences, rows: int) -> list[int]:
    """Return the number of the first sequence in each of the row's ``rows`` equal parts."""
    starts = [0, *itertools.accumulate(sequences.lengths)]
    length = starts.pop() // rows
    return [bisect_left(starts, row * length) for row in range(rows)]
