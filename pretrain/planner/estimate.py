"""Memory, bytes sent and time of one optimizer step under a layout of processes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from pretrain.checkpoint.teacher import count_run, teacher_beside
from pretrain.common.dtypes import DTYPES
from pretrain.config import ModelConfig, ParallelConfig, RunConfig
from pretrain.model.counts import ModelCounts, outputs
from pretrain.model.freezing import stage_without_learning
from pretrain.model.spec import block_specs
from pretrain.model.stages import Stage, split_into_stages
from pretrain.planner.cost import Cost
from pretrain.planner.figures import Estimate, StageEstimate
from pretrain.planner.hardware import Hardware
from pretrain.planner.kinds import ParameterKind, learning
from pretrain.planner.memory import Memory
from pretrain.planner.over_context import OverContext
from pretrain.planner.software import Software
from pretrain.planner.step_time import StepTime
from pretrain.planner.units import Unit, Units, measure_units


@dataclass
class _Pass:
    """A micro-batch's way through a stage, forward or backward.

    Attributes:
        seconds: Seconds, with the exchanges of tensor parallelism that are waited for.
        waits: Seconds of those.
        sent: Bytes that they send.
        flops: FLOPs of matrix multiplications.
    """

    seconds: float
    waits: float
    sent: float
    flops: float


@dataclass(frozen=True)
class _Taught:
    """A teacher's part in a stage: seconds and FLOPs of a micro-batch, and bytes of weights."""

    forward: float = 0.0
    flops: float = 0.0
    weights: float = 0.0


@dataclass
class Planner:
    """A planner of one run on one kind of hardware; simulations are cached."""

    config: RunConfig
    vocab_size: int
    hardware: Hardware
    software: Software = field(default_factory=Software)
    simulations: dict[object, Units] = field(default_factory=dict)
    _priced: dict[int, tuple[Cost, tuple[float, float]]] = field(default_factory=dict)

    @property
    def _memory(self) -> Memory:
        return Memory(self.config, self.vocab_size, self.hardware, self.software)

    @property
    def counts(self) -> ModelCounts:
        """Return the model's parameters and FLOPs."""
        return count_run(self.config, self.vocab_size, self.config.train.seq_len)

    @functools.cached_property
    def teacher(self) -> Planner | None:
        """Return the planner of the teacher that runs beside the model, None without one.

        It has the model's layout.
        """
        state = teacher_beside(self.config)
        if state is None:
            return None
        train = replace(self.config.train, segment_tokens=None, freeze=[])
        config = replace(self.config, model=state.model_config, distill=None, train=train)
        return Planner(config, state.vocab_size, self.hardware, self.software)

    def units(
        self,
        parallel: ParallelConfig,
        checkpointing: str,
        *,
        simulate: bool = True,
        segment: int | None = None,
    ) -> Units:
        """Return the cost of each unit of the model on one process.

        Without ``simulate`` the parameters alone are counted, which takes a fraction of a second.
        ``segment``: for so many tokens instead of a micro-batch's.
        """
        if segment is not None:
            parallel = replace(parallel, micro_batch_size=1)
        chain = parallel.context > 1 and parallel.context_cells == "chain"
        layout = (parallel.tensor, parallel.sequence, parallel.micro_batch_size, parallel.context)
        key = (*layout, chain, parallel.ring_scans, checkpointing, simulate, segment)
        if key not in self.simulations:
            train = self.config.train
            self.simulations[key] = measure_units(
                self.config.model,
                self.vocab_size,
                parallel,
                self.hardware.device,
                self.software,
                seq_len=segment or train.seq_len,
                precision=train.precision,
                activation_checkpointing=checkpointing,
                optimizer=self.config.optimizer.kind,
                frozen=self.config.frozen,
                simulate=simulate,
            )
        return self.simulations[key]

    def estimate(
        self, parallel: ParallelConfig, devices: int, checkpointing: str | None = None
    ) -> Estimate:
        """Estimate one step of the global batch; the layout must fit (see check_layout).

        The estimate's layout says how sequential cells are computed under context parallelism: the
        faster way where ``parallel`` leaves it open. Raises UserError for layers whose messages
        are not known, and for stages in which nothing learns.
        """
        self.check_learning(parallel)
        if parallel.context > 1 and parallel.context_cells == "auto":
            return self._with_cells(parallel, devices, checkpointing)
        train = self.config.train
        units = self.units(parallel, checkpointing or train.activation_checkpointing)
        data = devices // parallel.model_size
        tokens_at_once = train.seq_len * parallel.micro_batch_size
        micro_batches = train.global_batch_tokens // (tokens_at_once * data)
        stages = self._stages(parallel, units, data, micro_batches)
        step_time = StepTime(self.config, self.hardware, self._memory)
        seconds, sent = step_time(parallel, stages, data, micro_batches)
        factor = micro_batches * data * parallel.tensor * parallel.context
        return Estimate(
            parallel=parallel,
            devices=devices,
            micro_batches=micro_batches,
            stages=stages,
            seconds=seconds,
            sent=sent,
            tokens=train.global_batch_tokens,
            model_flops=self.counts.training_flops() * train.global_batch_tokens,
            hardware_flops=factor * sum(s.hardware_flops for s in stages),
            peak_flops=self.hardware.peak_flops(train.precision),
        )

    def _with_cells(
        self, parallel: ParallelConfig, devices: int, checkpointing: str | None
    ) -> Estimate:
        """Return the estimate with the faster way to compute cells; on a CPU over heads."""
        heads, chain = (replace(parallel, context_cells=way) for way in ("heads", "chain"))
        estimate = self.estimate(heads, devices, checkpointing)
        if not has_cells(self.config.model):
            return replace(estimate, parallel=parallel)
        if self.hardware.device == "cpu":
            return estimate
        other = self.estimate(chain, devices, checkpointing)
        return other if other.step_seconds < estimate.step_seconds else estimate

    def state_memory(self, parallel: ParallelConfig, devices: int) -> list[dict[str, float]]:
        """Return the bytes of ``weights``, ``gradients`` and ``optimizer`` by pipeline stage.

        They are there in every step, whatever the micro-batches; nothing is simulated. So are those
        of a ``teacher``, where there is one beside the model.
        """
        units = self.units(parallel, "none", simulate=False)
        data, kinds = devices // parallel.weights_size, ("weights", "gradients", "optimizer")
        states = [
            self._memory.held(parallel, *self._held_tensors(parallel, local, units), data)
            for local in self._local_stages(parallel)
        ]
        found = [{kind: memory[kind] for kind in kinds} for memory in states]
        if self.teacher is not None:
            taught = self.teacher.units(parallel, "none", simulate=False)
            for memory, local in zip(found, self.teacher._local_stages(parallel), strict=True):
                memory["teacher"] = self.teacher._weights(parallel, local, taught)
        return found

    def check_learning(self, parallel: ParallelConfig) -> None:
        """Raise UserError where a stage of the layout has nothing to learn, as training does."""
        if not self.config.frozen:
            return
        units = self.units(parallel, "none", simulate=False)
        for stage in itertools.chain.from_iterable(self._local_stages(parallel)):
            if not any(map(learning, self._held_tensors(parallel, [stage], units))):
                raise stage_without_learning(self.config.frozen)

    def _weights(self, parallel: ParallelConfig, local: Sequence[Stage], units: Units) -> float:
        """Return the bytes of the weights that a process has."""
        held = self._held_tensors(parallel, local, units)
        return float(sum(n * kind[0].itemsize for tensors in held for kind, n in tensors))

    def _local_stages(self, parallel: ParallelConfig) -> list[list[Stage]]:
        """Return the model chunks of each pipeline stage."""
        count, parts = parallel.pipeline, parallel.virtual_pipeline
        model, train = self.config.model, self.config.train
        all_stages = split_into_stages(
            model, self.vocab_size, train.seq_len, count * parts, "config"
        )
        return [all_stages[rank::count] for rank in range(count)]

    def _held_tensors(
        self, parallel: ParallelConfig, local: Sequence[Stage], units: Units
    ) -> tuple[list[tuple[ParameterKind, int]], list[tuple[ParameterKind, int]]]:
        """Return the parameters of a process, each with its kind and size: experts' apart."""
        held = list(self._held(local, units))
        tensors = [tensor for unit in held for tensor in unit.tensors]
        experts = [(kind, n // parallel.expert) for unit in held for kind, n in unit.expert_tensors]
        return tensors, experts

    def _stages(
        self, parallel: ParallelConfig, units: Units, data: int, micro_batches: int
    ) -> list[StageEstimate]:
        stages, segment, teacher = [], self.config.train.segment_tokens, self.teacher
        over_context = OverContext(self.hardware, parallel, self._seconds)
        held_at_once = units if segment is None else self.units(parallel, "none", segment=segment)
        for rank, local in enumerate(self._local_stages(parallel)):
            at_once = [list(self._chain(stage, held_at_once)) for stage in local]
            chains = [list(self._chain(stage, units)) for stage in local]
            tensors, expert_tensors = self._held_tensors(parallel, local, units)
            learns = [learning(held) for held in (tensors, expert_tensors)]
            memory = self._memory.held(parallel, tensors, expert_tensors, data * parallel.context)
            memory.update(self._memory.activations(parallel, at_once, rank, micro_batches, memory))
            taught = _Taught() if teacher is None else teacher._taught(parallel, rank)
            if taught.weights:
                memory["teacher"] = taught.weights
            units_passed = [pair for chain in chains for pair in chain]
            forward = self._pass([unit.forward for unit, _ in units_passed], parallel)
            trained_units = [unit for unit, trained in units_passed if trained]
            backward = self._pass([u.backward for u in trained_units], parallel, backward=True)
            exchanged = over_context.exchanges(units_passed)
            idle = over_context.chain_waits(units_passed)
            again = sum(self._again_seconds(unit.forward) for unit in trained_units)
            twice = segment is not None  # forward, all of it
            travels = [(u.routed, 1 + trained + twice) for u, trained in units_passed]
            routed = self._routed_bytes(parallel, sum(n * ways for n, ways in travels))
            # There and back, in each direction.
            routing = self.hardware.group_seconds(
                routed,
                2 * sum(ways for n, ways in travels if n) * (parallel.expert > 1),
                parallel.expert,
                self.hardware.devices_per_node,
            )
            stages.append(
                StageEstimate(
                    blocks=[stage.blocks for stage in local],
                    parameters=sum(n for _, n in tensors),
                    expert_parameters=sum(n for _, n in expert_tensors),
                    learning=learns[0],
                    learning_experts=learns[1],
                    memory=memory,
                    forward=forward.seconds
                    + routing / 2
                    + exchanged.forward
                    + idle.forward
                    + taught.forward,
                    backward=backward.seconds
                    + again
                    + twice * forward.seconds
                    + self._added_seconds(parallel, sum(learns))
                    + routing / 2
                    + exchanged.backward
                    + idle.backward,
                    hardware_flops=(1 + twice) * forward.flops + backward.flops + taught.flops,
                    tensor_bytes=(1 + twice) * forward.sent + backward.sent,
                    tensor_seconds=(1 + twice) * forward.waits + backward.waits,
                    expert_bytes=routed,
                    expert_seconds=routing,
                    context_bytes=exchanged.sent,
                    context_seconds=exchanged.forward + exchanged.backward,
                    chain_seconds=idle.forward + idle.backward,
                )
            )
        return stages

    def _taught(self, parallel: ParallelConfig, rank: int) -> _Taught:
        """Return what this model costs a process of a pipeline stage as the teacher of another."""
        units, local = self.units(parallel, "none"), self._local_stages(parallel)[rank]
        passed = [pair for stage in local for pair in self._chain(stage, units)]
        forward = self._pass([unit.forward for unit, _ in passed], parallel)
        exchanged = OverContext(self.hardware, parallel, self._seconds).exchanges(passed).forward
        weights = self._weights(parallel, local, units)
        return _Taught(forward.seconds + exchanged, forward.flops, weights)

    def _pass(
        self, costs: Sequence[Cost], parallel: ParallelConfig, *, backward: bool = False
    ) -> _Pass:
        """Return what a micro-batch's pass through units of these costs takes."""
        hardware = self.hardware
        pairs = [self._seconds(cost) for cost in costs]
        sent = sum(cost.bytes_sent for cost in costs)
        waits = hardware.group_seconds(
            sent,
            sum(cost.collectives for cost in costs),
            parallel.tensor,
            hardware.devices_per_node,
        )
        # Python runs ahead of a GPU, within a pass.
        busy = max(sum(device for device, _ in pairs), sum(host for _, host in pairs))
        if backward and self.software.overlaps_tensor and hardware.device != "cpu":
            # The input's gradient travels while the weights' are computed, about a quarter of the
            # pass; with sequence parallelism the gather behind each layer's output is waited for.
            beside = waits * (2 / 3 if parallel.sequence else 1.0)
            waits += hardware.waited(beside, busy / 4) - beside
        return _Pass(busy + waits, waits, sent, sum(cost.flops for cost in costs))

    def _seconds(self, cost: Cost) -> tuple[float, float]:
        key = id(cost)
        if key not in self._priced:
            self._priced[key] = (cost, self.hardware.cost_seconds(cost, self.software))
        return self._priced[key][1]

    def _again_seconds(self, cost: Cost) -> float:
        """Return the seconds of the products that another program's checkpointing repeats."""
        share = self.software.recomputed_products
        if not share:
            return 0.0
        products = {k: n for k, n in cost.kernels.items() if k.work.kind == "product"}
        return share * self.hardware.cost_seconds(Cost(kernels=products), self.software)[0]

    def _added_seconds(self, parallel: ParallelConfig, parameters: int) -> float:
        """Return the seconds in which a GPU adds a micro-batch's gradients to float32 sums."""
        if self.hardware.device == "cpu" or parallel.zero_stage == 3:
            return 0.0
        return self.hardware.memory_seconds(10.0 * parameters)

    def _routed_bytes(self, parallel: ParallelConfig, tokens: int) -> float:
        """Return the bytes a process sends when its ``tokens`` go to experts and back, evenly."""
        width = DTYPES[self.config.train.precision].itemsize * self.config.model.hidden_size
        return 2.0 * width * tokens * (parallel.expert - 1) / parallel.expert

    def _chain(self, stage: Stage, units: Units) -> Iterator[tuple[Unit, bool]]:
        """Yield the units a micro-batch passes in a stage, and whether gradients pass them too.

        They do not pass what comes before everything that learns.
        """
        needed = not stage.first
        for unit, trained in self._passed(stage, units):
            needed = needed or unit.learns or any(t.learns for t in units.tables.values())
            yield unit, trained and needed

    def _passed(self, stage: Stage, units: Units) -> Iterator[tuple[Unit, bool]]:
        """Yield the same, where all parameters learn."""
        recursion = self.config.model.recursion
        if stage.first:
            yield units.embedding, True
        blocks = stage.blocks
        if recursion is None or recursion.prelude not in blocks:
            yield from ((units.blocks[units.kinds[i]], True) for i in blocks)
        else:
            loop = range(recursion.prelude, len(units.kinds) - recursion.coda)
            through = min(recursion.times, recursion.backprop_last or recursion.times)
            yield from ((units.blocks[units.kinds[i]], True) for i in blocks[: loop.start])
            assert units.loop is not None
            for number in range(recursion.times):
                trained = number >= recursion.times - through
                yield units.loop, trained
                yield from ((units.blocks[units.kinds[i]], trained) for i in loop)
            rest = range(loop.stop, blocks.stop)
            yield from ((units.blocks[units.kinds[i]], True) for i in rest)
            for _ in range(outputs(recursion) - 1):
                yield from ((units.blocks[units.kinds[i]], True) for i in rest)
                yield units.head, True
        if stage.last:
            yield units.head, True

    def _held(self, stages: Sequence[Stage], units: Units) -> Iterator[Unit]:
        """Yield the units whose parameters a process holds, each once."""
        tied, specs = self.config.model.tie_embeddings, block_specs(self.config.model)
        recursion = self.config.model.recursion
        if any(s.first or (s.last and tied) for s in stages):
            yield units.embedding
        for stage in stages:
            yield from (units.blocks[units.kinds[i]] for i in stage.blocks)
            names = dict.fromkeys(specs[i].name for i in stage.blocks)
            yield from (units.tables[name] for name in names if name in units.tables)
            if recursion is not None and recursion.prelude in stage.blocks and units.loop:
                yield units.loop
        if any(s.last for s in stages):
            yield units.head


def has_cells(config: ModelConfig) -> bool:
    """Return whether a model has sequential cells that can also be computed over heads."""
    return any(spec.mixer.over_time == "cells" for spec in block_specs(config))
