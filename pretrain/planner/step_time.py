"""The time of a step from that of its stages: pipeline, exchanges of gradients, the update."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.common.dtypes import DTYPES
from pretrain.config import ParallelConfig, RunConfig
from pretrain.model.shared import FirstValuesOnTheWay
from pretrain.parallel.context import ParallelContext
from pretrain.planner.figures import StageEstimate
from pretrain.planner.hardware import Hardware
from pretrain.planner.memory import LIVE_PARAMETERS, Memory


@dataclass(frozen=True)
class StepTime:
    """The time of one run's steps on one kind of hardware."""

    config: RunConfig
    hardware: Hardware
    memory: Memory

    def __call__(
        self,
        parallel: ParallelConfig,
        stages: list[StageEstimate],
        data: int,
        micro_batches: int,
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return (seconds of a step by what takes them, bytes that a process sends in it).

        ``data``: the data-parallel size, without context parallelism.
        """
        hardware, train = self.hardware, self.config.train
        width = DTYPES[train.precision].itemsize
        count, parts = parallel.pipeline, parallel.virtual_pipeline
        both = [s.forward + s.backward for s in stages]
        slowest = max(both)
        fill = (sum(both) - slowest) / parts
        tensor = micro_batches * max(s.tensor_seconds for s in stages)
        expert = micro_batches * max(s.expert_seconds for s in stages)
        context = micro_batches * max(s.context_seconds for s in stages)
        chained = micro_batches * max(s.chain_seconds for s in stages)
        # Megatron's order of ranks: tensor, context, data, pipeline.
        per_node = hardware.devices_per_node
        across = data * parallel.model_size > per_node
        rows = train.seq_len * parallel.micro_batch_size / parallel.context
        here = ParallelContext(
            tensor_size=parallel.tensor, sequence_parallel=parallel.sequence and parallel.tensor > 1
        )
        beside = FirstValuesOnTheWay(self.config.model, here).width
        activation = (
            (self.config.model.hidden_size + beside)
            * rows
            * width
            / (parallel.tensor if parallel.sequence else 1)
        )
        borders = 0 if count == 1 else 2 * parts
        message = hardware.link_seconds(activation, 1, spans_nodes=across)
        # Interleaved messages overlap with the work; others are waited for, there and back.
        waits = micro_batches if parts == 1 else 0
        pipeline = (waits + count - 1) * 2 * message if count > 1 else 0.0
        replicas = data * parallel.context
        copies = replicas * parallel.tensor // parallel.expert  # of an expert
        times, gradients_late = self._exchanges(parallel, micro_batches, width)
        exchanged = times * max(
            s.learning * (replicas - 1) / replicas + s.learning_experts * (copies - 1) / copies
            for s in stages
        )
        in_node = max(per_node // parallel.tensor, 1)
        if parallel.zero_stage == 3:
            numbers = [s.parameters + s.expert_parameters for s in stages]
            gathered = max(n * (1 + _gathered_again(n)) for n in numbers) * (data - 1) / data
            exchanged += micro_batches * width * gathered
            exposed = micro_batches * max(self._gather_waits(s, data, in_node) for s in stages)
        else:
            exposed = hardware.group_seconds(exchanged, 2 * (replicas > 1), replicas, in_node)
            if parallel.overlap and gradients_late:
                exposed = self.hardware.waited(exposed, min(s.backward for s in stages) / parts)
        dense_shards, expert_shards = (replicas, copies) if parallel.zero_stage else (1, 1)
        whole = 2.0 / data if parallel.zero_stage == 3 else 8.0
        moved = max(
            s.learning * (28.0 / dense_shards + whole)
            + s.learning_experts * (28.0 / expert_shards + whole)
            for s in stages
        )
        seconds = {
            "compute": micro_batches * slowest - tensor - expert - context - chained,
            "tensor parallel": tensor,
            "expert parallel": expert,
            "context parallel": context,
            "waiting for states": chained,
            "pipeline bubble": fill,
            "pipeline messages": pipeline,
            "data parallel": exposed,
            "optimizer": hardware.memory_seconds(moved),
        }
        sent = {
            "tensor parallel": micro_batches * max(s.tensor_bytes for s in stages),
            "expert parallel": micro_batches * max(s.expert_bytes for s in stages),
            "context parallel": micro_batches * max(s.context_bytes for s in stages),
            "pipeline": micro_batches * borders * activation,
            "data parallel": exchanged,
        }
        return seconds, sent

    def _gather_waits(self, stage: StageEstimate, data: int, in_node: int) -> float:
        """Return the seconds of a micro-batch that ZeRO-3's exchanges take beyond the work.

        Weights are gathered block by block ahead of both passes, and gradients reduced behind the
        backward pass.
        """
        if data == 1:
            return 0.0
        number = stage.parameters + stage.expert_parameters
        width = DTYPES[self.config.train.precision].itemsize
        once = number * width * (data - 1) / data
        again = _gathered_again(number)
        reduced = (stage.learning + stage.learning_experts) / number
        calls = 2 * sum(len(blocks) for blocks in stage.blocks)
        times = [
            self.hardware.group_seconds(once * share, calls * n, data, in_node)
            for share, n in ((1.0, 1), (reduced + again, 2))
        ]
        works = (stage.forward, stage.backward)
        return sum(
            self.hardware.waited(time, work) for time, work in zip(times, works, strict=True)
        )

    def _exchanges(
        self, parallel: ParallelConfig, micro_batches: int, width: int
    ) -> tuple[float, bool]:
        """Return (bytes that data-parallel ranks exchange in a step, whether late).

        They are those per parameter that learns, without weights that ZeRO-3 gathers. Late means
        during the last backward pass.
        """
        if parallel.zero_backend == "megatron":
            # Gradients are float32; without ZeRO they are all-reduced, there and back, and so they
            # are where ZeRO deals out whole parameters, whose new values are sent then.
            if self.memory.layer_wise(parallel):
                return 8.0 + width, True
            return (8.0 if parallel.zero_stage == 0 else 4.0 + width), True
        times = {0: 2, 1: 3, 2: 2 * micro_batches + 1, 3: micro_batches}
        return float(width * times[parallel.zero_stage]), parallel.zero_stage > 1


def _gathered_again(parameters: int) -> float:
    """Return the share of the weights that ZeRO-3 gathers a second time, for the backward pass."""
    return max(1 - LIVE_PARAMETERS / parameters, 0.0)
