"""The states that rows of a batch carry on to the next one: truncated back-propagation in time.

Row r of a step reads on where row r of the step before ended (see TrainingBatches), and every layer
goes on from its state there. No gradient goes through it: it is a constant of the step. Sequences
that begin in a row begin without a state.

A process keeps the states of its own rows. All of them have one size: of a window, whose keys are
packed, the rows are padded to the window. Of a row that is divided over ranks (context parallelism)
the rank has it where the row begins, and the one where it ends sends it there after the step.
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
import torch.distributed as dist
from torch import Tensor

from pretrain.common.config_loader import ConfigError
from pretrain.data.sequences import Sequences, without_waiting
from pretrain.nn.mixers.base import State, accumulation_dtype
from pretrain.ops.across import crossing, swap_in
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
    leaving: State  # of rows that end here and begin on another rank, until the step is over

    def state_of(self, rows: slice) -> State:
        """Return the state of some rows as the mixer has it."""
        state = {name: value[rows] for name, value in self.values.items()}
        for name in self.owner.windowed_states:
            places = torch.arange(self.owner.state_window, device=state[name].device)
            state[name] = state[name][places < state["lengths"][:, None]]
        return state

    def keep(self, rows: slice, state: State, *, leaving: bool = False) -> None:
        """Keep the state of some rows, or of some that leave."""
        for name, value in state.items():
            kept = (self.leaving if leaving else self.values)[name][rows]
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
        self._context = context = model.context
        size, rank = context.context_size, context.context_rank
        self._homes, self._ends = homes_and_ends(rows, size)
        self._local = [row for row in range(rows) if self._homes[row] == rank]
        ended = [row for row in range(rows) if self._ends[row] == rank]
        self._stay = [row for row in ended if self._homes[row] == rank]
        self._leave = [row for row in ended if self._homes[row] != rank]  # one at most
        self._layers: list[_Layer] = []
        times = None if model.recursion is None else model.recursion.config.times
        passes = Counter[int]()
        for index in model.blocks_by_state(times):
            block = cast("Block", model.blocks[index])
            owner, name = block.states, type(block.mixer).__name__
            values, leaving = (
                _initial(owner, name, micro_batches * len(rows_here))
                for rows_here in (self._local, self._leave)
            )
            self._layers.append(_Layer(owner, name, index, passes[index], values, leaving))
            passes[index] += 1
        self._continues: list[tuple[bool, ...]] = []
        self._seeds, self._rank, self._world_size = (0, 0), 0, 1
        self._entered = 0
        self._lasts: list[Tensor] = []  # the pieces behind which rows that stay, and leave, end

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
        pieces = _Pieces(sequences, self._rows, self._context.context_size)
        # A state before any token stands behind those of rows.
        begins = [len(self._local)] * sequences.count
        for slot, row in enumerate(self._local):
            if self._continues[number][row]:
                begins[pieces.first(row)] = slot
        lasts = ([pieces.last(row) for row in rows] for rows in (self._stay, self._leave))
        chosen, *self._lasts = (
            without_waiting(torch.tensor(x, dtype=torch.int64, device="cpu"), sequences.device)
            for x in (begins, *lasts)
        )
        states = []
        for layer in self._layers:
            joined = layer.owner.init_state(1)
            if self._local:
                kept = self._noisy(layer, layer.state_of(self._slots(number)), number)
                joined = layer.owner.join_states([kept, joined])
            states.append(layer.owner.select_state(joined, chosen))
        if crossing(sequences) is not None:
            entered = pieces.entered_row
            goes_on = entered is not None and self._continues[number][entered]
            self._count_before(states, number, entered if goes_on else None)
        return states

    @torch.no_grad()
    def leave(self, states: Sequence[State]) -> None:
        """Keep the states behind the sequences of the micro-batch that was entered last."""
        number = self._entered - 1
        stay, leave = self._lasts
        first = self._slots(number).start
        for layer, state in zip(self._layers, states, strict=True):
            if self._stay:  # the first ones of those that begin here
                rows = slice(first, first + len(self._stay))
                layer.keep(rows, layer.owner.select_state(state, stay))
            if self._leave:
                rows = slice(number, number + 1)
                layer.keep(rows, layer.owner.select_state(state, leave), leaving=True)
        self._lasts = []

    @torch.no_grad()
    def finish(self) -> None:
        """Send the states of rows to where they begin, after all micro-batches of a step.

        All context-parallel ranks must call.
        """
        if self._homes == self._ends:
            return
        size, rank = self._context.context_size, self._context.context_rank
        count = self._entered
        values = [layer.values[name] for layer in self._layers for name in sorted(layer.values)]
        leaving = [layer.leaving[name] for layer in self._layers for name in sorted(layer.values)]
        routes = {(self._ends[row], home) for row, home in enumerate(self._homes)}
        sends = [count if other != rank and (rank, other) in routes else 0 for other in range(size)]
        gets = [count if other != rank and (other, rank) in routes else 0 for other in range(size)]
        found = swap_in(
            self._context.context_group,
            [[value[:n] for value in leaving] for n in sends],
            [[(n, *value.shape[1:]) for value in values] for n in gets],
        )
        for n, received in zip(gets, found, strict=True):
            if n:  # of the last row that begins here, the only one that ends elsewhere
                for value, new in zip(values, received, strict=True):
                    value.unflatten(0, (self._micro_batches, -1))[:n, -1].copy_(new)

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
        found: dict[str, tuple[Shape, list[tuple[Shape, Tensor]]]] = {}
        if not self._local:
            return found
        first = self._local[0]
        for layer in self._layers:
            for name, value in layer.values.items():
                inner = value.shape[1:]
                full = (shards, size * self._micro_batches * self._rows, *inner)
                parts = [
                    (
                        (shard, (number * size + rank) * self._rows + first, *(0 for _ in inner)),
                        value[self._slots(number)][None],
                    )
                    for number in range(self._micro_batches)
                ]
                found[f"carried.{layer.block}.{layer.depth}.{name}"] = full, parts
        return found

    def _slots(self, number: int) -> slice:
        return slice(number * len(self._local), (number + 1) * len(self._local))

    def _count_before(self, states: list[State], number: int, entered: int | None) -> None:
        """Tell this segment's first piece how many tokens its sequence had before the row.

        ``entered`` is its row, where the sequence has gone on in it from the step before.
        """
        counting = [i for i, layer in enumerate(self._layers) if "seen" in layer.values]
        if not counting:
            return
        device = states[counting[0]]["seen"].device
        seen = torch.zeros(len(counting), self._rows, dtype=torch.int64, device=device)
        for known, i in zip(seen, counting, strict=True):
            known[self._local] = self._layers[i].values["seen"][self._slots(number)]
        dist.all_reduce(seen, group=self._context.context_group)
        if entered is not None:
            for known, i in zip(seen, counting, strict=True):
                states[i]["seen"] = states[i]["seen"].clone()
                states[i]["seen"][0] = known[entered]

    def _noisy(self, layer: _Layer, state: State, number: int) -> State:
        """Return the state of a micro-batch's rows with noise, which each row draws by itself."""
        if self._noise == 0:
            return state
        exact = {*layer.owner.windowed_states, *layer.owner.exact_states}
        first = (number * self._world_size + self._rank) * self._rows + self._local[0]
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


def homes_and_ends(rows: int, size: int) -> tuple[list[int], list[int]]:
    """Return on which of ``size`` context-parallel ranks each row of a micro-batch begins and ends.

    A rank has the states of the rows that begin on it, and during a step also of those that end.
    """
    homes = [row * size // rows for row in range(rows)]
    ends = [((row + 1) * size - 1) // rows for row in range(rows)]
    return homes, ends


class _Pieces:
    """Where the ``rows`` rows of a micro-batch, of equal length, lie among its sequences.

    These may be one of ``size`` segments, which hold pieces of them.
    """

    def __init__(self, sequences: Sequences, rows: int, size: int):
        self._length = sequences.num_tokens * size // rows
        segment = sequences.segment
        begins = 0 if segment is None else segment.rank * sequences.num_tokens
        self._starts = [begins, *(begins + n for n in itertools.accumulate(sequences.lengths))]
        self._starts.pop()
        self._seen = 0 if segment is None else segment.seen

    def first(self, row: int) -> int:
        """Return the number of the piece that a row begins with."""
        return bisect_left(self._starts, row * self._length)

    def last(self, row: int) -> int:
        """Return the number of the piece that a row ends with."""
        return self.first(row + 1) - 1

    @property
    def entered_row(self) -> int | None:
        """Return the row whose first sequence goes on in this segment, None if none does."""
        row, into = divmod(self._starts[0] - self._seen, self._length)
        return row if self._seen and into == 0 else None
