"""The planner's figures of a step: memory by stage, seconds, bytes sent, and rates of them."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import ParallelConfig


@dataclass
class StageEstimate:
    """The estimate of a process of one pipeline stage.

    Attributes:
        blocks: The blocks of each model chunk.
        parameters: Parameters of the process, without those of experts.
        expert_parameters: Parameters of its experts.
        learning: Those of ``parameters`` that learn.
        learning_experts: Those of ``expert_parameters`` that learn.
        memory: Bytes by kind, at the moment when they are most.
        forward: Seconds of one micro-batch, with the exchanges of tensor and expert parallelism.
        backward: The same of the backward pass.
        hardware_flops: FLOPs of one micro-batch, with recomputation.
        tensor_bytes: Bytes sent between tensor-parallel processes per micro-batch.
        tensor_seconds: Seconds of that.
        expert_bytes: Bytes sent between expert-parallel processes per micro-batch.
        expert_seconds: Seconds of that.
        context_bytes: Bytes sent between context-parallel processes per micro-batch.
        context_seconds: Seconds of that.
        chain_seconds: Seconds per micro-batch that they wait for one another's states.
    """

    blocks: list[range]
    parameters: int
    expert_parameters: int
    learning: int
    learning_experts: int
    memory: dict[str, float]
    forward: float
    backward: float
    hardware_flops: float
    tensor_bytes: float
    tensor_seconds: float
    expert_bytes: float
    expert_seconds: float
    context_bytes: float
    context_seconds: float
    chain_seconds: float

    @property
    def peak(self) -> float:
        """Return the bytes of all kinds together."""
        return sum(self.memory.values())


@dataclass
class Estimate:
    """The estimate of one optimizer step.

    Attributes:
        seconds: Seconds of a step, by what takes them.
        sent: Bytes per step and process, by kind, of the stage that sends most.
        tokens: Tokens of the global batch.
        model_flops: FLOPs of a step without recomputation.
        hardware_flops: FLOPs of a step with recomputation.
        peak_flops: Dense peak of a device, FLOP/s.
    """

    parallel: ParallelConfig
    devices: int
    micro_batches: int
    stages: list[StageEstimate]
    seconds: dict[str, float]
    sent: dict[str, float]
    tokens: int
    model_flops: float
    hardware_flops: float
    peak_flops: float

    @property
    def data_parallel(self) -> int:
        """Return the data-parallel size."""
        return self.devices // self.parallel.model_size

    @property
    def step_seconds(self) -> float:
        """Return the seconds of a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Return the speed of all devices together."""
        return self.tokens / self.step_seconds

    @property
    def memory(self) -> dict[str, float]:
        """Return the bytes by kind of the stage that needs most."""
        return max(self.stages, key=lambda s: s.peak).memory

    @property
    def peak_memory(self) -> float:
        """Return the bytes of the stage that needs most."""
        return max(stage.peak for stage in self.stages)

    @property
    def mfu(self) -> float:
        """Return the model's FLOPs over the devices' dense peak: recomputation does not count."""
        return self._utilization(self.model_flops)

    @property
    def hfu(self) -> float:
        """Return the FLOPs that the devices really compute over their dense peak."""
        return self._utilization(self.hardware_flops)

    def _utilization(self, flops: float) -> float:
        return flops / (self.step_seconds * self.devices * self.peak_flops)
