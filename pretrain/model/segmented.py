"""The losses of a row of any length on one device, segment by segment, with exact gradients.

The forward pass goes over the segments without gradients and keeps, at their borders, what the
blocks carry on. The backward pass goes from the last segment to the first: it computes the segment
again from its border, and passes gradients through it from its losses and from what the later
segment left of the states between them. Nothing is truncated: gradients are those of the row as a
whole. Activations are those of one segment, and every product is computed twice forward, as with
activation checkpointing by block.

Of sequences that end in a segment nothing is carried on; those that begin in it start afresh.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.model.block import Block
from pretrain.model.block_states import StateOwner
from pretrain.nn.mixers import State
from pretrain.nn.mixers.base import without_states
from pretrain.nn.moe import MoE

if TYPE_CHECKING:
    from pretrain.model.language_model import LanguageModel


def comes_in_segments(model: LanguageModel, tokens: Tensor) -> bool:
    """Return whether the losses of tokens ``[B, T]`` are computed segment by segment.

    They are where one row has more tokens than a segment.
    """
    size = model.segment_tokens
    return size is not None and len(tokens) == 1 and tokens.shape[1] > size


def segmented_losses(
    model: LanguageModel, tokens: Tensor, targets: Tensor, sequences: Sequences | None
) -> Tensor:
    """Return the losses of ``targets`` ``[1, T]`` as :class:`.LanguageModel` does.

    Gradients reach parameters alone, when ``backward`` comes to the losses: as for reentrant
    checkpointing, ``torch.autograd.grad`` finds none.
    """
    if sequences is None:
        sequences = Sequences.of_rows(1, tokens.shape[1], tokens.device)
    row = _Row(model, tokens, targets, list(segments(sequences, model.segment_tokens or 1)))
    if model.dropout is not None and model.training:
        row.drop_from = model.dropout.next_row(tokens.shape[1])
    if not torch.is_grad_enabled():
        return row.losses()
    # The result needs a gradient although no argument of the function has one.
    anchor = torch.zeros((), device=tokens.device, requires_grad=True)
    losses: Tensor = _Segmented.apply(anchor, row)
    return losses


class Segment(NamedTuple):
    """Consecutive tokens of a row.

    Attributes:
        tokens: Where in the row they are.
        lengths: Of what they have of the row's sequences, none of it empty.
        continues: Whether the first piece's sequence began before.
        goes_on: Whether the last piece's sequence goes on behind.
    """

    tokens: slice
    lengths: list[int]
    continues: bool
    goes_on: bool


def segments(row: Sequences, size: int) -> Iterator[Segment]:
    """Yield the segments of ``size`` tokens, the last of them what is left of a row."""
    total = row.num_tokens
    ends = {0, total, *accumulate(row.lengths)}
    cuts = iter(sorted(ends.union(range(0, total, size))))
    first = next(cuts)
    lengths: list[int] = []
    begin = first
    for cut in cuts:
        lengths.append(cut - first)
        first = cut
        if cut % size == 0 or cut == total:
            yield Segment(slice(begin, cut), lengths, begin not in ends, cut not in ends)
            lengths, begin = [], cut


@dataclass
class _Row:
    """A row on its way through the model, and what is kept of it between both passes."""

    model: LanguageModel
    tokens: Tensor
    targets: Tensor
    segments: list[Segment]
    drop_from: Any = None
    borders: list[list[State] | None] = field(default_factory=list)
    buffers: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    loads: dict[MoE, Tensor] = field(default_factory=dict)

    @property
    def owners(self) -> list[StateOwner]:
        return [cast(Block, self.model.blocks[index]).states for index in self.model.stage.blocks]

    def losses(self, *, keep: bool = False) -> Tensor:
        """Return all losses ``[1, T]``; ``keep``: for :meth:`backward` to follow."""
        states, result = None, None
        for segment in self.segments:
            if keep:
                self._keep(states)
            losses, states = self._run(segment, states)
            if result is None:
                result = losses.new_empty(self.targets.shape)
            result[:, segment.tokens] = losses
            for experts in self.model.experts() if keep else ():
                load = cast(Tensor, experts.last_load)
                self.loads[experts] = self.loads.get(experts, 0) + load
        return cast(Tensor, result)

    def backward(self, gradient: Tensor) -> None:
        """Add to the parameters' gradients what follows from that of the losses, ``[1, T]``."""
        for experts, load in self.loads.items():
            experts.row_load = load
        try:
            after, passed = None, None
            for number in reversed(range(len(self.segments))):
                before = self._restored(self.borders.pop(), after)
                # A parameter's gradient is complete with the first segment alone.
                paused = self.model.reduction_paused() if number else nullcontext()
                with torch.enable_grad(), paused:
                    passed = self._backward_of(self.segments[number], before, gradient, passed)
                after = before
        finally:
            for experts in self.loads:
                experts.row_load = None

    def _backward_of(
        self,
        segment: Segment,
        before: list[State] | None,
        gradient: Tensor,
        passed: list[State] | None,
    ) -> list[State] | None:
        """Return the gradients of the states before a segment, from those ``passed`` behind it."""
        leaves = None if before is None else [_map_floats(_leaf, state) for state in before]
        losses, states = self._run(segment, leaves)
        outputs, gradients = [losses], [gradient[:, segment.tokens]]
        for state, wanted in zip(states or (), passed or (), strict=True):
            for name, of_one in wanted.items():
                if state[name].requires_grad:
                    outputs.append(state[name])
                    gradients.append(of_one)
        torch.autograd.backward(outputs, gradients)
        if leaves is None:
            return None
        return [
            {name: value.grad for name, value in state.items() if value.grad is not None}
            for state in leaves
        ]

    def _run(
        self, segment: Segment, states: list[State] | None
    ) -> tuple[Tensor, list[State] | None]:
        """Return a segment's losses, and the states of what goes on behind it."""
        model, count = self.model, len(segment.lengths)
        if states is not None and count > 1:
            states = [
                owner.join_states([state, owner.init_state(count - 1)])
                for owner, state in zip(self.owners, states, strict=True)
            ]
        # Made anew, because it holds what layers derive from it, such as masks.
        pieces = Sequences.from_lengths(segment.lengths, self.tokens.device)
        drop = None if self.drop_from is None else self.drop_from(segment.tokens.start)
        with nullcontext() if segment.goes_on else without_states():
            x, after, _ = model._hidden(
                self.tokens[:, segment.tokens], pieces, states, with_states=True, drop=drop
            )
        losses = model._losses(x, self.targets[:, segment.tokens].t().contiguous()).t()
        if not segment.goes_on:
            return losses, None
        if count > 1:
            last = torch.tensor([count - 1], device=x.device)
            after = [
                owner.select_state(state, last)
                for owner, state in zip(self.owners, after, strict=True)
            ]
        return losses, after

    def _keep(self, states: list[State] | None) -> None:
        """Keep the states at a border, once what they have in common with the one before it."""
        number, before = len(self.borders), self.borders[-1] if self.borders else None
        kept = None
        if states is not None:
            kept = [
                {name: self._own(number, (i, name), value, before) for name, value in state.items()}
                for i, state in enumerate(states)
            ]
        self.borders.append(kept)
        if len(self.borders) < 2 or len(self.segments[len(self.borders) - 2].lengths) > 1:
            return
        earlier = self.borders[-2]
        if states is None or earlier is None:
            return
        for owner, state in zip(self.owners, earlier, strict=True):
            for name in owner.growing_states:
                state[name] = state[name].to("meta")  # its length alone

    def _own(
        self, number: int, key: tuple[int, str], value: Tensor, before: list[State] | None
    ) -> Tensor:
        """Return a value of border ``number`` that holds no more memory than its own.

        Those of one shape share a buffer: apart they would break up the memory in which activations
        come and go.
        """
        buffer, (layer, name) = self.buffers.get(key), key
        if buffer is None and before is not None and before[layer][name].shape == value.shape:
            buffer = value.new_empty(len(self.segments), *value.shape)
            self.buffers[key] = buffer
        if buffer is not None and buffer.shape[1:] == value.shape:
            return buffer[number].copy_(value)
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value

    def _restored(
        self, states: list[State] | None, later: list[State] | None
    ) -> list[State] | None:
        """Return the states at a border, with what was only kept at the one behind it."""
        for owner, state, full in zip(self.owners, states or (), later or (), strict=False):
            for name in owner.growing_states:
                if state[name].is_meta:
                    state[name] = full[name][: len(state[name])]
        return states


class _Segmented(torch.autograd.Function):
    """The losses of a row, whose gradient goes straight to the parameters."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, row: _Row) -> Tensor:
        ctx.row = row
        return row.losses(keep=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        row, ctx.row = ctx.row, None
        if row is None:
            raise RuntimeError(
                "the gradients of a row in segments were computed before; expected one backward "
                "pass for each forward pass"
            )
        row.backward(gradient)
        return None, None


def _map_floats(function: Any, state: State) -> State:
    return {n: function(v) if v.is_floating_point() else v for n, v in state.items()}


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()
