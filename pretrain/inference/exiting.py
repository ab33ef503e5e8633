"""A recursive model whose tokens leave the loop one by one, each when it has read enough.

With the ``latest`` rule the layers of the loop see, in pass i, what an earlier token gave them in
its pass i, or in its last one if that was earlier. All tokens of a call can then go through the
loop together: those that have left keep their state and what their mixers read. With the ``shared``
rule they see of an earlier token its last pass, whatever theirs: tokens go one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.common.errors import UserError
from pretrain.data.sequences import Sequences
from pretrain.inference.depth_used import DepthUsed, depth_summary
from pretrain.inference.exits import ExitRule, Watch
from pretrain.model.block import Block, FirstValues
from pretrain.model.block_states import MLP_SHIFT, StateOwner
from pretrain.model.depth_lora import set_depth
from pretrain.model.language_model import LanguageModel
from pretrain.model.recursion import Recursion
from pretrain.model.spec import block_specs, tokens_seen_ahead
from pretrain.nn.channel_mixing import ChannelMixing
from pretrain.nn.mixers import Mixer, State

_NUMBERS_AT_ONCE = 2**27  # 0.5 GiB in float32


@dataclass
class Reading:
    """What a call returns: hidden rows ``[N, d]``, states to go on from, and the depth used."""

    rows: Tensor
    states: list[State]
    used: DepthUsed


class ExitingModel(nn.Module):
    """A model with exits, to be scored and generated from as the model itself.

    Its states are those of the model (with the ``shared`` rule one for each block of the loop), and
    how many tokens each text has. What tokens used adds up in ``used``.
    """

    def __init__(self, model: LanguageModel, rule: ExitRule, candidates: int | None = None) -> None:
        """Give ``model`` exits; distributions are over the first ``candidates`` ids.

        Raises UserError where it has no loop that tokens can leave.
        """
        super().__init__()
        self.model, self.rule = model, rule
        self.candidates = candidates or model.vocab_size
        self.model_config, self.vocab_size = model.model_config, model.vocab_size
        self.context = model.context
        self.used: list[DepthUsed] = []
        _check(model, rule)
        self._shared = rule.cache == "shared"
        # What the coda makes of an earlier token is known when that token has left.
        coda = len(model.blocks) > model.loop.stop
        self._one_by_one = self._shared or (rule.reads_outputs and coda)
        self._lora = self._recursion.config.lora_rank > 0

    @property
    def _recursion(self) -> Recursion:
        return cast(Recursion, self.model.recursion)

    @property
    def times(self) -> int:
        """Return the most passes that a token makes."""
        return self._recursion.times or self._recursion.config.times

    def summary(self) -> dict[str, Any]:
        """Return what the tokens of all calls so far used, see :func:`.depth_summary`."""
        return depth_summary(self.used, self.model_config, self.vocab_size, self.times)

    def take_summary(self) -> dict[str, Any]:
        """Return :meth:`summary`, and begin anew."""
        found, self.used = self.summary(), []
        return found

    @property
    def tokens_at_once(self) -> int:
        """Return how many tokens a call had better have: two distributions of each are kept."""
        kept = self.vocab_size if self.rule.reads_outputs else self.model_config.hidden_size
        return max(_NUMBERS_AT_ONCE // kept, 1)

    def score(self, x: Tensor, targets: Tensor, candidates: int | None = None) -> Tensor:
        """Score targets as :meth:`.LanguageModel.score` does."""
        return self.model.score(x, targets, candidates)

    def next_logits(self, x: Tensor) -> Tensor:
        """Return logits as :meth:`.LanguageModel.next_logits` does."""
        return self.model.next_logits(x)

    def forward_with_state(
        self, tokens: Tensor, states: list[State] | None
    ) -> tuple[Tensor, list[State]]:
        """Return logits ``[B, T, vocab]`` after tokens ``[B, T]``, and states to go on from."""
        rows, states = self.hidden_with_state(tokens, states)
        return self.next_logits(rows).view(*tokens.shape, -1), states

    def hidden_with_state(
        self, tokens: Tensor, states: list[State] | None, *, sequences: Sequences | None = None
    ) -> tuple[Tensor, list[State]]:
        """Return hidden rows and states as :meth:`.LanguageModel.hidden_with_state` does."""
        reading = self.read(tokens, states, sequences=sequences)
        self.used.append(reading.used)
        return reading.rows, reading.states

    def select_states(self, states: list[State], indices: Tensor) -> list[State]:
        """Return the states of some of the sequences, in the order of ``indices``."""
        *layers, seen = states
        selected = [
            self._owner(index).select_state(state, indices)
            for index, state in zip(self._blocks_by_state(), layers, strict=True)
        ]
        return [*selected, {"seen": seen["seen"][indices]}]

    def _blocks_by_state(self) -> list[int]:
        return self.model.blocks_by_state(1 if self._shared else self.times)

    def _block(self, index: int) -> Block:
        return cast(Block, self.model.blocks[index])

    def _owner(self, index: int) -> StateOwner:
        return self._block(index).states

    @torch.no_grad()
    def read(
        self, tokens: Tensor, states: list[State] | None, *, sequences: Sequences | None = None
    ) -> Reading:
        """Read tokens ``[B, T]``, or packed ``[1, N]``; the depth used is not added to ``used``."""
        lengths = (
            [tokens.shape[1]] * tokens.shape[0] if sequences is None else list(sequences.lengths)
        )
        if self._one_by_one and max(lengths) > 1:
            return self._read_one_by_one(tokens.flatten(), states, lengths)
        return self._read_together(tokens, states, sequences, lengths)

    def _read_one_by_one(
        self, tokens: Tensor, states: list[State] | None, lengths: list[int]
    ) -> Reading:
        """Read the next token of every text that has one, until none has."""
        starts, device = np.cumsum([0, *lengths[:-1]]), tokens.device
        running, now, ended = list(range(len(lengths))), states, list[tuple[int, list[State]]]()
        order, rows, used = list[int](), list[Tensor](), list[DepthUsed]()
        done = list[int]()
        for step in range(max(lengths)):
            places = [int(starts[number]) + step for number in running]
            at = torch.tensor(places, device=device)
            found = self._read_together(tokens[at, None], now, None, [1] * len(running))
            order += places
            rows.append(found.rows)
            used.append(found.used)
            stays = [k for k, number in enumerate(running) if lengths[number] > step + 1]
            leaves = [k for k, number in enumerate(running) if lengths[number] == step + 1]
            if leaves:
                gone = self.select_states(found.states, torch.tensor(leaves, device=device))
                ended.append((len(leaves), gone))
                done += [running[k] for k in leaves]
            now = found.states
            if leaves and stays:
                now = self.select_states(now, torch.tensor(stays, device=device))
            running = [running[k] for k in stays]
        back = np.argsort(order, kind="stable")
        joined = self._joined([states for _, states in ended])
        in_order = torch.from_numpy(np.argsort(done, kind="stable")).to(device)
        return Reading(
            torch.cat(rows)[torch.from_numpy(back).to(device)],
            self.select_states(joined, in_order),
            DepthUsed.together(used).take(back),
        )

    def _joined(self, groups: list[list[State]]) -> list[State]:
        """Return the states of several groups of texts as those of all of them, in order."""
        blocks = self._blocks_by_state()
        joined = [
            self._owner(index).join_states([states[i] for states in groups])
            for i, index in enumerate(blocks)
        ]
        return [*joined, {"seen": torch.cat([states[-1]["seen"] for states in groups])}]

    def _read_together(
        self,
        tokens: Tensor,
        states: list[State] | None,
        sequences: Sequences | None,
        lengths: list[int],
    ) -> Reading:
        """Read all tokens at once; see the module for when that may be done."""
        model, loop = self.model, self.model.loop
        firsts: dict[str, FirstValues] = {}
        after: list[State] = []
        x = model.embed(tokens, firsts)
        x = model.run_blocks(
            x, range(loop.start), sequences, states=states, after=after, firsts=firsts
        )
        through = _Loop(self, x, states, sequences, firsts)
        through.run()
        after += through.states()
        x, coda = through.coda(through.state)
        count = torch.tensor(lengths, device=tokens.device)
        before = torch.zeros_like(count) if states is None else states[-1]["seen"]
        positions = np.concatenate(
            [np.arange(1, n + 1) + k for n, k in zip(lengths, before.tolist(), strict=True)]
        )
        passes, outputs = (n.t().flatten().cpu().numpy() for n in (through.passes, through.outputs))
        told = not self._shared and (states is not None or self._lora)
        carried = (self.times - passes) * told
        return Reading(
            x.transpose(0, 1).flatten(0, 1),
            [*after, *coda, {"seen": before + count}],
            DepthUsed(positions, passes, outputs, carried),
        )


class _Loop:
    """One call's way through the loop: x ``[T, B, d]``, the prelude's output, to ``state``."""

    def __init__(
        self,
        exiting: ExitingModel,
        x: Tensor,
        states: list[State] | None,
        sequences: Sequences | None,
        firsts: dict[str, FirstValues],
    ) -> None:
        self._exiting, self._model, self._x = exiting, exiting.model, x
        self._old, self._sequences, self._firsts = states, sequences, firsts
        self._recursion, self._blocks = exiting._recursion, exiting.model.loop
        self.state = self._recursion.initial(x)
        self.passes = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        self.outputs = torch.zeros_like(self.passes)
        self._running = torch.ones_like(self.passes, dtype=torch.bool)
        self._made: list[list[State]] = []  # by pass
        self._read: dict[nn.Module, Tensor] = {}  # what each layer read of each token last

    def run(self) -> None:
        """Make passes until every token has left."""
        times = self._exiting.times
        watch = Watch(self._exiting.rule, times)
        for index in range(times):
            entering = self._recursion.pass_input(self.state, self._x, index)
            made: list[State] = []
            with self._held():
                new = self._model.run_blocks(
                    entering,
                    self._blocks,
                    self._sequences,
                    depth=index,
                    states=self._before(index),
                    after=made,
                    firsts=self._firsts,
                )
            self._made.append(made)
            before, self.state = self.state, torch.where(self._running[..., None], new, self.state)
            self.passes += self._running
            if watch.needs_outputs(index + 1):
                self.outputs += self._running
            fires = watch.fires(
                index + 1, before[self._running], self.state[self._running], self._logits
            )
            watch.keep(~fires)
            self._running[self._running.clone()] = ~fires
            if not bool(self._running.any()):
                return

    def _before(self, index: int) -> list[State] | None:
        """Return the states that pass ``index`` goes on from."""
        if self._old is None:
            return None
        size = len(self._blocks)
        first = self._blocks.start + (0 if self._exiting._shared else index * size)
        return self._old[first : first + size]

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Let what looks at other tokens read of each that has left what it read of it last."""

        def hold(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = arguments
            if layer in self._read:
                x = torch.where(self._running[..., None], x, self._read[layer])
            self._read[layer] = x
            return (x, *others)

        with ExitStack() as stack:
            for index in self._blocks:
                block = self._exiting._block(index)
                for layer in (block.mixer, block.mlp):
                    if isinstance(layer, Mixer | ChannelMixing):
                        stack.callback(layer.register_forward_pre_hook(hold).remove)
            yield

    def _logits(self) -> Tensor:
        """Return the logits ``[N, candidates]`` after the tokens that still run."""
        x = self.coda(self.state)[0][self._running]
        return self._model.next_logits(x)[:, : self._exiting.candidates]

    def coda(self, state: Tensor) -> tuple[Tensor, list[State]]:
        """Return the last block's output for the loop's, and the states of the coda's blocks."""
        model, after = self._model, list[State]()
        blocks = range(self._blocks.stop, len(model.blocks))
        x = model.after_loop(state)
        old = None if self._old is None else self._old[len(self._old) - 1 - len(blocks) : -1]
        x = model.run_blocks(
            x, blocks, self._sequences, states=old, after=after, firsts=dict(self._firsts)
        )
        return x, after

    def states(self) -> list[State]:
        """Return the states of the loop's blocks, in the order in which later calls read them."""
        if self._exiting._shared:
            return self._last_states()
        for index in range(len(self._made), self._exiting.times):
            self._made.append([self._deeper(index, number) for number in range(len(self._blocks))])
        return [state for made in self._made for state in made]

    def _deeper(self, index: int, number: int) -> State:
        """Return a block's state of pass ``index``, which no token has made."""
        block = self._exiting._block(self._blocks[number])
        mixer, x = block.mixer, self._read[block.mixer]
        old, made = self._before(index), self._made[-1][number]
        set_depth(block, index)
        state = None if old is None else old[number]
        if self._exiting._lora:  # the pass has weights of its own, which the last input has not
            own = mixer(x, sequences=self._sequences, state=state)[1]
            return {**own, **{name: made[name] for name in made if name == MLP_SHIFT}}
        if state is None:
            return made
        return block.states.carried_state(x, self._sequences, state, made)

    def _last_states(self) -> list[State]:
        """Return each block's state behind each text's last pass; there is one token of each."""
        passes = self.passes[0]
        numbers = [int(n) for n in passes.unique()]
        if len(numbers) == 1:
            return self._made[numbers[0] - 1]
        rows = [(passes == n).nonzero()[:, 0] for n in numbers]
        back = torch.argsort(torch.cat(rows))
        found = []
        for number, index in enumerate(self._blocks):
            owner = self._exiting._owner(index)
            parts = [
                owner.select_state(self._made[n - 1][number], some)
                for n, some in zip(numbers, rows, strict=True)
            ]
            found.append(owner.select_state(owner.join_states(parts), back))
        return found


def _check(model: LanguageModel, rule: ExitRule) -> None:
    """Raise UserError unless tokens can leave the model's loop by ``rule``."""
    config = model.model_config
    if model.recursion is None:
        raise UserError(f"exit is {rule}, but the model has no loop that tokens could leave")
    if model.recursion.config.halting:
        raise UserError(
            f"exit is {rule}, but the model halts by itself (model.recursion.halting): its "
            "output is a mean over the passes"
        )
    if model.recursion.config.step_signal == "coordinate":
        raise UserError(
            f"exit is {rule}, but the model's passes add coordinates "
            "(model.recursion.step_signal), which tokens that leave by themselves have no form of"
        )
    if tokens_seen_ahead(config):
        raise UserError(f"exit is {rule}, but a layer of the model sees a text's start at once")
    times = model.recursion.times or model.recursion.config.times
    if rule.min_passes > times:
        raise UserError(
            f"min_passes is {rule.min_passes}, but the loop makes {times} passes; expected at "
            "most as many"
        )
    specs = block_specs(config)
    for spec in (specs[i] for i in model.loop):
        if spec.mixer.first_values(spec.config, config.hidden_size):
            raise UserError(
                f"exit is {rule}, but {spec.name} blocks in the loop hand values from block to "
                "block, which a token that has left no longer makes"
            )
