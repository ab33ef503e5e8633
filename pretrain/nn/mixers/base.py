"""The interface of sequence mixers, and the registry that pattern strings name them from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

from pretrain.common.config_loader import Config
from pretrain.data.sequences import Sequences
from pretrain.nn.mixers.conversion import Conversion
from pretrain.nn.parameters import DescribedModule
from pretrain.nn.shared_tables import SharedTable, TableRow
from pretrain.ops.shared.watching import Watch, is_backward_pass
from pretrain.parallel.context import ParallelContext

if TYPE_CHECKING:
    from pretrain.nn.mixers.mitigations import Mitigations

State = dict[str, Tensor]
SHAREABLE = ("num_kv_heads", "num_groups", "num_qk_heads", "num_qk_groups")


_states_wanted: ContextVar[bool] = ContextVar("_states_wanted", default=True)


@contextmanager
def states_if(wanted: bool) -> Iterator[None]:
    """Let mixers leave out of the states that they return what takes work, unless ``wanted``."""
    token = _states_wanted.set(wanted)
    try:
        yield
    finally:
        _states_wanted.reset(token)


def without_states() -> AbstractContextManager[None]:
    """Let mixers leave out of the states that they return what takes work, while open."""
    return states_if(False)


def states_wanted() -> bool:
    """Return whether somebody reads the states that mixers return."""
    return _states_wanted.get()


@dataclass(frozen=True)
class LayerContext:
    """The model that a mixer is built into.

    Attributes:
        hidden_size: width of the model.
        std: standard deviation of the Gaussian that inner projections start from.
        output_std: the same, of the output projection.
        parallel: this rank's part of the layout.
        index: which of the model's blocks this is, from 0.
        count: how many blocks there are.
        seq_len: tokens of a sequence of the training batches, which are packed one after another in
            a row; None: a row is one.
        number: which of the blocks of its kind (of its name in the pattern) this is, from 0.
        tables: what the model keeps for all of them, by name; see :meth:`Mixer.shared_tables`.
    """

    hidden_size: int
    std: float
    output_std: float
    parallel: ParallelContext
    index: int = 0
    count: int = 1
    seq_len: int | None = None
    number: int = 0
    tables: Mapping[str, SharedTable] = field(default_factory=dict)

    def table_row(self, name: str, width: int) -> TableRow:
        """Return the mixer's row of one of its :meth:`Mixer.shared_tables`, ``width`` wide.

        Outside of a model that is the only row of a table that belongs to the mixer.
        """
        table = self.tables.get(name)
        if table is None:
            return TableRow(None, 0, SharedTable(self.parallel, 1, width, name))
        return TableRow(table, self.number)


@dataclass(frozen=True)
class MixerCard:
    """A mixer's line in docs/layers.md.

    Attributes:
        name: what the layer is called.
        equation: one head's recurrence.
        state: what it carries from token to token.
        over_time: how it is computed over time.
        source: paper.
        sharded: what tensor parallelism shards.
    """

    name: str
    equation: str
    state: str
    over_time: str
    source: str
    sharded: str = "H"


@dataclass(frozen=True)
class MixerConfig(Config):
    """Base of the settings of a mixer. Fields of type ``Derived`` follow the model's width.

    ``head_sizes`` names those that are sizes of one head, which maximal-update parametrization
    keeps at every width, and ``head_counts`` the numbers of heads that grow instead, the first of
    which decides on their size where it is given.
    """

    head_sizes: ClassVar[tuple[str, ...]] = ("head_dim",)
    head_counts: ClassVar[tuple[str, ...]] = ("num_heads",)

    def resolve(self, hidden_size: int) -> Self:
        """Return these settings with every size that is null filled in for ``hidden_size``.

        Raises ValueError where those that are given do not fit the width.
        """
        return self

    def resolve_from(self, base_hidden_size: int | None, hidden_size: int) -> Self:
        """Return them filled in for ``hidden_size``, with heads of the base model's size if any.

        A number of heads that is given decides on their size by itself, as in :meth:`resolve`.
        """
        given = any(getattr(self, name, None) is not None for name in self.head_counts[:1])
        if given or base_hidden_size in (None, hidden_size):
            return self.resolve(hidden_size)
        base = self.resolve(base_hidden_size)
        kept = {name: getattr(base, name) for name in self.head_sizes if hasattr(base, name)}
        return replace(self, **kept).resolve(hidden_size)


class Mixer(DescribedModule, ABC):
    """A layer that mixes information along the sequence; activations are ``[T, B, d]``.

    ``config_class`` is a frozen dataclass of the mixer's settings, which a mixer and its class
    methods only see resolved; ``card`` is its line in docs/layers.md. The class methods count
    without building anything; they count the full layer, not this process's shard.

    ``over_time`` says who looks beyond a segment of a row (context parallelism): ``state``, the
    model, which hands the state over from segment to segment, right for any mixer; or ``ops``, the
    mixer itself, which then computes the segments side by side; or ``cells``, either, as
    ``parallel.context_cells`` says: ops that ranks share by the mixer's ``num_heads``.
    """

    config_class: ClassVar[type[MixerConfig]]
    card: ClassVar[MixerCard]
    over_time: ClassVar[Literal["state", "ops", "cells"]] = "state"
    speed_settings: ClassVar[tuple[str, ...]] = ("chunk_size",)  # that change nothing but speed
    conversion: ClassVar[Conversion | None] = None  # how it begins as attention; None: it cannot
    # In the state, what only gets longer: of one sequence, an earlier state's is a prefix.
    growing_states: tuple[str, ...] = ()
    # What is packed: of each sequence its last tokens, as many as the state's ``lengths`` says.
    windowed_states: tuple[str, ...] = ()
    state_window: int = 0  # the most of them
    counts_tokens: ClassVar[bool] = False  # whether a state's ``seen`` is how many there were
    exact_states: tuple[str, ...] = ()  # that noise would make meaningless
    # The settings of states at inference that it knows; see pretrain.nn.mixers.mitigations.
    mitigable: tuple[str, ...] = ()
    mitigations: Mitigations | None = None
    depth: int = 0  # the pass of a loop that runs, from 0; set by the model
    watcher: Watch | None = None  # while a step is watched
    parallel: ParallelContext
    num_heads: int  # of this process, where it has heads

    @abstractmethod
    def __init__(self, config: Any, context: LayerContext):
        super().__init__()

    @abstractmethod
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Mix x ``[T, B, d]`` along T.

        With ``sequences`` B is 1 and N sequences are packed along T; without, each of the B rows is
        one. ``state`` is that of N sequences to continue from. Returns y of x's shape, and the
        state after each sequence's last token. The sequences are a segment of a row
        (``sequences.segment``) only where ``over_time`` is not ``state``.
        """

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token for each of B sequences, ``[B, d]``."""
        y, state = self(x[None], state=state)
        return y[0], state

    @abstractmethod
    def init_state(self, batch_size: int) -> State:
        """Return the state before any token."""

    def select_state(self, state: State, indices: Tensor) -> State:
        """Return the states of some of the sequences, ``[M]`` int64 numbers from 0.

        A sequence may be selected several times.
        """
        return {name: values[indices] for name, values in state.items()}

    def join_states(self, states: Sequence[State]) -> State:
        """Return the states of several groups of sequences as that of all of them, in order.

        The counterpart of :meth:`select_state`; who overrides one overrides both.
        """
        return {name: torch.cat([state[name] for state in states]) for name in states[0]}

    def carried_state(
        self, x: Tensor, sequences: Sequences | None, state: State, made: State
    ) -> State:
        """Return ``state``, of a deeper pass of a loop, behind tokens that do not make that pass.

        x is what they gave this layer in their last pass and ``made`` the state behind them in it;
        the deeper pass reads them as that one did.
        """
        return self(x, sequences=sequences, state=state)[1]

    def shortened_state(self, state: State, tokens: int) -> State | None:
        """Return one sequence's state as it was ``tokens`` tokens ago, None where that is lost."""
        return None

    def metrics(self) -> dict[str, float]:
        """Return and reset the metrics that the layer accumulated since the last call.

        A key ending in ``_max`` is reduced by the largest over layers and processes, others by sum.
        """
        return {}

    @property
    def watch(self) -> Watch | None:
        """Return who watches this forward pass, None if nobody does.

        What is computed again for the backward pass has been watched before.
        """
        return None if is_backward_pass() else self.watcher

    def note(self, **values: Tensor | None) -> None:
        """Show numbers of a forward pass to whoever watches the step; a mixer need not call it.

        ``log_decay``, of any shape, are logarithms of decays, whose mean is the memory's horizon.
        Of ``logits``, what a softmax over positions is of, the largest is taken, and of anything
        else, gates, the mean.
        """
        if (watch := self.watch) is not None:
            watch({name: v for name, v in values.items() if v is not None})

    def memory(self, state: State) -> Tensor | None:
        """Return what of a state is rewritten at every token ``[N, ...]``, if anything.

        Four axes are a matrix for each head, ``[N, H, K, V]``.
        """
        return state.get("recurrent")

    @classmethod
    def check(cls, config: Any, hidden_size: int) -> None:
        """Raise ValueError where the settings do not fit each other or ``hidden_size``."""

    @classmethod
    def sees_ahead(cls, config: Any) -> int:
        """Return at how many of a sequence's first tokens outputs depend on later ones."""
        return 0

    @classmethod
    def sharded_counts(cls, config: Any, hidden_size: int) -> dict[str, int]:
        """Return the counts that tensor parallelism shards, by the name of their setting.

        One of a name in ``SHAREABLE`` may also be 1, and is then shared by all processes.
        """
        return {"num_heads": config.num_heads}

    @classmethod
    def shared_tables(cls, config: Any, hidden_size: int) -> dict[str, int]:
        """Return the widths of the tables that all blocks of one kind share, by name.

        The model keeps each with a row for every such block; ``context.table_row`` gives access.
        """
        return {}

    @classmethod
    def first_values(cls, config: Any, hidden_size: int) -> dict[str, int]:
        """Return the widths of what the first block of a kind hands to the later ones, by name.

        Of each token, ``[T, B, width]`` in the activations' dtype, the width divided over
        tensor-parallel ranks. :meth:`forward` then takes a further argument ``first``, a dict of
        them: the first block (``context.number == 0``) puts them in, later ones take them out. It
        is None where there is no model, as in :meth:`step` of a layer alone.
        """
        return {}

    @classmethod
    def added_later(cls, config: Any, hidden_size: int) -> tuple[int, int]:
        """Return the parameters and FLOPs per token that later blocks have more than the first.

        What they do with its :meth:`first_values`.
        """
        return 0, 0

    @classmethod
    @abstractmethod
    def num_parameters(cls, config: Any, hidden_size: int) -> int:
        """Return the parameters of the layer, norms inside it included, shared tables not."""

    @classmethod
    @abstractmethod
    def flops_per_token(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        """Return the matrix-multiply FLOPs of one token's forward pass.

        ``seq_len`` is the length of its sequence.
        """

    @classmethod
    def flops_per_pass(cls, config: Any, hidden_size: int) -> int:
        """Return the matrix-multiply FLOPs of a forward pass whatever its number of tokens.

        They are beside :meth:`flops_per_token`: of what is made of parameters alone, which
        selective activation checkpointing makes again.
        """
        return 0

    @classmethod
    @abstractmethod
    def state_bytes(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        """Return the bytes of one sequence's state after ``seq_len`` tokens.

        Activations count as bfloat16.
        """


M = TypeVar("M", bound=type[Mixer])
_REGISTRY: dict[str, type[Mixer]] = {}


def register(name: str) -> Callable[[M], M]:
    """Make a mixer known to pattern strings as ``name``."""

    def add(mixer: M) -> M:
        if name in _REGISTRY:
            raise ValueError(f"two mixers are called '{name}'")
        _REGISTRY[name] = mixer
        return mixer

    return add


def registry() -> dict[str, type[Mixer]]:
    """Return all mixers by name."""
    return dict(_REGISTRY)


def heads(x: Tensor, num_heads: int) -> Tensor:
    """Split ``[T, B, H * D]`` into batch-first ``[B, T, H, D]``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(0, 1)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or wider where the model is."""
    return torch.promote_types(dtype, torch.float32)
