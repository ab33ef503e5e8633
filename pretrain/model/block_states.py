"""Handle what a block carries from token to token.

That is its mixer's state. RWKV's channel mixing has one of its own, the last input, which stands
beside it under a name of its own: whoever keeps states (generation, carried rows, segments, trees
of prefixes, early exits) has one dict for each block, as before, and asks ``block.states`` for what
it would ask the mixer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.nn.channel_mixing import ChannelMixing
from pretrain.nn.mixers.base import Mixer, State

MLP_SHIFT = "mlp_shift"


class StateOwner(Protocol):
    """The part of :class:`.Mixer` that handles states."""

    @property
    def growing_states(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def windowed_states(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def state_window(self) -> int: ...  # noqa: D102
    @property
    def exact_states(self) -> tuple[str, ...]: ...  # noqa: D102

    def init_state(self, batch_size: int) -> State: ...  # noqa: D102
    def select_state(self, state: State, indices: Tensor) -> State: ...  # noqa: D102
    def join_states(self, states: Sequence[State]) -> State: ...  # noqa: D102
    def shortened_state(self, state: State, tokens: int) -> State | None: ...  # noqa: D102
    def carried_state(  # noqa: D102
        self, x: Tensor, sequences: Sequences | None, state: State, made: State
    ) -> State: ...


class WithMLPState:
    """The states of a block whose MLP has one: the mixer's, and ``mlp_shift`` ``[N, 1, d]``."""

    def __init__(self, mixer: Mixer, mlp: ChannelMixing):
        self._mixer, self._mlp = mixer, mlp
        self.growing_states, self.windowed_states = mixer.growing_states, mixer.windowed_states
        self.state_window, self.exact_states = mixer.state_window, mixer.exact_states

    def init_state(self, batch_size: int) -> State:
        """Return the state before any token."""
        shift = self._mlp.init_state(batch_size)
        return {**self._mixer.init_state(batch_size), MLP_SHIFT: shift}

    def select_state(self, state: State, indices: Tensor) -> State:
        """Return the states of some of the sequences."""
        own, shift = split_state(state)
        return {**self._mixer.select_state(own, indices), MLP_SHIFT: shift[indices]}

    def join_states(self, states: Sequence[State]) -> State:
        """Return the states of several groups of sequences as that of all of them, in order."""
        owns, shifts = zip(*map(split_state, states), strict=True)
        return {**self._mixer.join_states(owns), MLP_SHIFT: torch.cat(shifts)}

    def shortened_state(self, state: State, tokens: int) -> State | None:
        """Return None: which input came before the last one is lost."""
        return None

    def carried_state(
        self, x: Tensor, sequences: Sequences | None, state: State, made: State
    ) -> State:
        """Return ``state`` behind tokens that do not make its pass; their last input stays."""
        own, _ = split_state(state)
        own_made, shift = split_state(made)
        return {**self._mixer.carried_state(x, sequences, own, own_made), MLP_SHIFT: shift}


def split_state(state: State) -> tuple[State, Tensor]:
    """Return a block's state as its mixer's and that of its MLP."""
    own = {name: value for name, value in state.items() if name != MLP_SHIFT}
    return own, state[MLP_SHIFT]
