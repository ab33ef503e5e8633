"""The cost of each unit of a model on one tensor- and context-parallel process.

Units are the embedding, one block of each kind, what a loop has besides its blocks, and the head
with the loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.common.dtypes import DTYPES
from pretrain.common.errors import UserError
from pretrain.config import ModelConfig, ParallelConfig
from pretrain.data.sequences import Sequences, segment_of
from pretrain.model.float8 import multiply_in_float8
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs
from pretrain.nn.dropout import EMBEDDING
from pretrain.nn.mixers import Mixer
from pretrain.nn.mixers.over_segments import beyond_segments
from pretrain.nn.moe import MoE
from pretrain.nn.parameters import info_of
from pretrain.ops.chain import planned_chain
from pretrain.optim.optimizer import rule_of
from pretrain.planner.cost import Cost
from pretrain.planner.fake_group import planned_context
from pretrain.planner.kinds import ParameterKind, block_kinds, count_kinds, freeze, frozen_part
from pretrain.planner.simulation import (
    Simulation,
    TooManyOperationsError,
    operations_limited,
)
from pretrain.planner.software import Software

# Operations of one pass that are simulated as they are; longer loops over time are measured on
# shorter sequences and extrapolated.
_PATIENCE = 40_000
_FEW = 3_000  # so many are simulated before it is asked whether there is a loop


@dataclass
class Unit:
    """One part of a model: what it holds, and what one micro-batch through it costs."""

    name: str
    tensors: list[tuple[ParameterKind, int]]
    """Kind and elements of each parameter of this process, experts apart."""
    expert_tensors: list[tuple[ParameterKind, int]]
    """The same of the parameters of all experts."""
    routed: int
    """Tokens times the experts that each goes to."""
    forward: Cost
    """The cost of a micro-batch's forward pass; ``kept`` waits for the backward pass."""
    backward: Cost
    """The cost of the same micro-batch's backward pass."""
    unchained: tuple[Cost, Cost] | None = None
    """Where a segment's mixer waits for the state of the one before: both costs of all that does
    not."""

    @property
    def parameters(self) -> Counter[ParameterKind]:
        """Return the elements of this process's parameters by kind, experts apart."""
        return count_kinds(self.tensors)

    @property
    def learns(self) -> bool:
        """Return whether any of its parameters learns."""
        return any(kind[2] is not None for kind, _ in (*self.tensors, *self.expert_tensors))


@dataclass
class Units:
    """The units of a model.

    Attributes:
        blocks: One of each kind, by the kind's name.
        kinds: The kind of every block of the pattern; see :func:`block_kinds`, and what is frozen.
        loop: What a loop has besides its blocks, if there is one.
        tables: What the blocks of one name in the pattern share, by it; work on it is the blocks'.
    """

    embedding: Unit
    blocks: dict[str, Unit]
    kinds: list[str]
    loop: Unit | None
    head: Unit
    tables: dict[str, Unit]

    def each(self) -> list[Unit]:
        """Return every unit once, in the order of a forward pass."""
        loop = [] if self.loop is None else [self.loop]
        return [self.embedding, *self.blocks.values(), *self.tables.values(), *loop, self.head]


def measure_units(
    config: ModelConfig,
    vocab_size: int,
    parallel: ParallelConfig,
    device: str,
    software: Software,
    *,
    seq_len: int,
    precision: str,
    activation_checkpointing: str,
    optimizer: str,
    frozen: Sequence[str] = (),
    simulate: bool = True,
) -> Units:
    """Simulate every kind of unit; without ``simulate`` only count what each holds.

    The tensor, sequence and context parallelism and the micro-batch size are those of ``parallel``,
    ``device`` is the type of the device (``cuda``, ``cpu``). ``frozen`` are patterns of parameters
    that do not learn. Raises UserError for layers whose messages between segments depend on what
    they have seen, and for patterns that match nothing, or everything.
    """
    context = planned_context(
        DTYPES[precision],
        parallel.tensor,
        sequence_parallel=parallel.sequence,
        context_size=parallel.context,
        context_rank=busiest_segment(parallel.micro_batch_size, parallel.context),
        context_cells="chain" if parallel.context_cells == "chain" else "heads",
    )
    with torch.device("meta"):
        model = LanguageModel(
            config, vocab_size, context, activation_checkpointing=activation_checkpointing
        )
    if precision == "fp8":
        multiply_in_float8(model, context)
    freeze(model, frozen)
    if software.logits_bytes:
        model.logits_at_once = 2**62
    return _Measurement(model, parallel, device, software, seq_len, optimizer, simulate).all()


def busiest_segment(rows: int, segments: int) -> int:
    """Return the segment of a micro-batch's row whose rank receives and sends most states."""

    def messages(rank: int) -> tuple[int, int]:
        crossed = [rank > 0 and rank * rows % segments, rank + 1 < segments]
        crossed[1] = crossed[1] and (rank + 1) * rows % segments
        return sum(map(bool, crossed)), rank * rows % segments

    return max(range(segments), key=messages)


class _Unmixed(nn.Module):
    """A mixer that does nothing."""

    over_time = "ops"

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return x, {}


def _check_states(kind: str, mixer: Mixer, segments: int) -> None:
    state = mixer.init_state(1)
    if any(tensor.shape[:1] != (1,) for tensor in state.values()):
        raise UserError(
            f"parallel.context is {segments}, but the states that {kind} layers hand on grow with "
            "what they have seen, which is not planned; expected 1"
        )


class _Measurement:
    def __init__(
        self,
        model: LanguageModel,
        parallel: ParallelConfig,
        device: str,
        software: Software,
        seq_len: int,
        optimizer: str,
        simulate: bool,
    ):
        self.optimizer, self.simulate = optimizer, simulate
        self.model, self.seq_len = model, seq_len
        self.device, self.software = device, software
        self.rows, self.segments = parallel.micro_batch_size, parallel.context
        self.ring = parallel.ring_scans
        self.token_shards = parallel.tensor if parallel.sequence else 1

    def all(self) -> Units:
        model, kinds = self.model, block_kinds(self.model.model_config)
        kinds = [k + frozen_part(b) for k, b in zip(kinds, model.blocks, strict=True)]
        blocks = {}
        for index, kind in enumerate(kinds):
            if kind not in blocks:
                unit: Any = model.blocks[index]
                chained = self.segments > 1 and not beyond_segments(unit.mixer)
                if self.simulate and chained:
                    _check_states(kind, unit.mixer, self.segments)
                blocks[kind] = self._unit(kind, [unit], partial(self._block, index=index))
                if self.simulate and chained:
                    blocks[kind].unchained = self._unchained(blocks[kind], unit, index)
        loop = None
        if model.recursion is not None:
            recursion = model.recursion.config
            once = dataclasses.replace(recursion, times=1, sampling="fixed", backprop_last=None)
            model.recursion.config = once
            loop = self._unit("loop", [model.recursion], self._loop)
            model.recursion.config = recursion
        head: list[nn.Module] = [model.final_norm]
        if not model.model_config.tie_embeddings:
            head.append(model.head)
        return Units(
            embedding=self._unit("embedding", [model.embedding], self._embedding),
            blocks=blocks,
            kinds=kinds,
            loop=loop,
            head=self._unit("head", head, self._head),
            tables={
                name: self._unit(f"tables of {name}", [tables], lambda _: (Cost(), Cost()))
                for name, tables in model.tables.items()
            },
        )

    def _unchained(self, unit: Unit, block: Any, index: int) -> tuple[Cost, Cost]:
        mixer, block.mixer = block.mixer, _Unmixed()
        try:
            forward, backward = self._over_time(partial(self._block, index=index))
        finally:
            block.mixer = mixer
        if self.model.activation_checkpointing == "block":  # before the gradient is waited for
            again = unit.forward.plus(forward, -1)
            again.context_bytes = again.context_messages = 0.0
            backward = backward.plus(again, 1)
        return forward, backward

    def _unit(
        self, name: str, modules: list[nn.Module], measure: Callable[[int], tuple[Cost, Cost]]
    ) -> Unit:
        tensors: list[tuple[ParameterKind, int]] = []
        expert_tensors: list[tuple[ParameterKind, int]] = []
        routed, tokens = 0, self.rows * self.seq_len // self.segments // self.token_shards
        for module in modules:
            for p in module.parameters():
                info = info_of(p)
                of_expert = info.shard is not None and info.shard.over == "expert"
                rule = rule_of(info, self.optimizer) if p.requires_grad else None
                kind = (p.dtype, info.weight_decay, rule)
                (expert_tensors if of_expert else tensors).append((kind, p.numel()))
            routed += sum(tokens * m.config.top_k for m in module.modules() if isinstance(m, MoE))
        return Unit(name, tensors, expert_tensors, routed, *self._over_time(measure))

    def _over_time(self, measure: Callable[[int], tuple[Cost, Cost]]) -> tuple[Cost, Cost]:
        """Measure at the wanted length, or extrapolate where a loop over time would take long.

        The extrapolation is linear in the length, from shorter ones.
        """
        if not self.simulate:
            return Cost(), Cost()
        length = self.seq_len
        short = max(2 ** (math.ceil(math.log2(length)) - 4), 64) * self.segments
        if length < 8 * short:
            return measure(length)
        try:
            with operations_limited(_FEW):
                return measure(length)
        except TooManyOperationsError:
            pass  # a loop over time
        a, b = measure(short), measure(2 * short)
        a_count, b_count = (sum(cost.operations for cost in pair) for pair in (a, b))
        per_token = max(b_count - a_count, 0) / short
        if b_count + per_token * (length - 2 * short) <= _PATIENCE:
            return measure(length)
        if b_count + per_token * 2 * short <= _PATIENCE:
            short, a, b = 2 * short, b, measure(4 * short)
        factor = (length - 2 * short) / short
        forward, backward = (y.plus(y.plus(x, -1), factor) for x, y in zip(a, b, strict=True))
        return forward, backward

    def _tokens(self, length: int) -> int:
        """Return the tokens of this process of a micro-batch whose sequences have so many."""
        return self.rows * length // self.segments

    def _hidden(self, tokens: int) -> Tensor:
        return self._empty(tokens // self.token_shards, self.model.model_config.hidden_size)

    def _empty(self, tokens: int, width: int) -> Tensor:
        dtype = self.model.context.dtype
        return torch.empty(tokens, 1, width, dtype=dtype, device="meta", requires_grad=True)

    def _run(self, inputs: list[Tensor], forward: Callable[[], Tensor]) -> tuple[Cost, Cost]:
        """Measure a forward and a backward pass.

        Gradients of parameters are freed at once, as by data parallelism, which adds them to a
        buffer.
        """
        self.model.train()
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            for p in self.model.parameters()
            if p.requires_grad
        ]
        try:
            group = self.model.context.context_group
            with (
                nullcontext() if group is None else planned_chain(group),
                Simulation(self.device, self.software) as simulation,
            ):
                simulation.exclude([*self.model.parameters(), *inputs])
                output, ahead = simulation.measure(forward)
                back = Cost()
                if output.requires_grad:
                    _, back = simulation.measure(lambda: output.backward(torch.empty_like(output)))
                # Relative to what was there before the forward pass.
                back.peak += ahead.kept
        finally:
            for hook in hooks:
                hook.remove()
        return ahead, back

    def _block(self, length: int, index: int) -> tuple[Cost, Cost]:
        sequences = Sequences.of_rows(self.rows, length, "cpu")
        if self.segments > 1:
            context = self.model.context
            sequences = segment_of(
                sequences,
                context.context_rank,
                self.segments,
                context.context_group,
                ring=self.ring,
            )
        x = self._hidden(sequences.num_tokens)
        drop = None if self.model.dropout is None else self.model.dropout.next_micro_batch()
        blocks, model = range(index, index + 1), self.model
        spec, context = block_specs(model.model_config)[index], model.context
        firsts: dict[str, dict[str, Tensor]] = {}
        if spec.later:
            names = spec.mixer.first_values(spec.config, model.model_config.hidden_size)
            firsts[spec.name] = {
                name: self._empty(sequences.num_tokens, context.local(width, name))
                for name, width in names.items()
            }
        handed = [value for values in firsts.values() for value in values.values()]
        return self._run(
            [x, *handed],
            lambda: model.run_blocks(x, blocks, sequences, drop=drop, firsts=dict(firsts)),
        )

    def _loop(self, length: int) -> tuple[Cost, Cost]:
        x, recursion = self._hidden(self._tokens(length)), self.model.recursion
        assert recursion is not None
        return self._run([x], lambda: recursion(x, lambda s, _: s, all_passes=True)[0])

    def _embedding(self, length: int) -> tuple[Cost, Cost]:
        tokens = torch.zeros(1, self._tokens(length), dtype=torch.int64)
        drop = None if self.model.dropout is None else self.model.dropout.next_micro_batch()

        def embed() -> Tensor:
            x = self.model.embed(tokens)
            return x if drop is None else drop(x, EMBEDDING)

        return self._run([], embed)

    def _head(self, length: int) -> tuple[Cost, Cost]:
        tokens = self._tokens(length)
        x, targets = self._hidden(tokens), torch.zeros(tokens, 1, dtype=torch.int64)
        return self._run([x], lambda: self.model._losses(x, targets).sum())
