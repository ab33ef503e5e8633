"""How processes share the work."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.common.config_loader import setting

ZERO_BACKENDS = ("megatron", "deepspeed")


@dataclass
class ParallelConfig:
    """How processes share the work. What remains of them after tensor x pipeline is data-parallel.

    tensor: processes that share every layer by its heads and channels; sequence: they also share
    the tokens outside the layers. pipeline: stages that the blocks are divided into, evenly by
    their FLOPs; virtual_pipeline: parts of every stage, gone through by turns (less idle time, more
    messages). expert: processes, of those that share the data, that divide a mixture's experts
    among them. micro_batch_size: sequences per forward pass.

    zero_stage: what data-parallel processes divide among them: 0 nothing, 1 the optimizer's state,
    2 gradients too, 3 parameters too; zero_backend: ``megatron`` (0 and 1) or ``deepspeed`` (0 and
    1, without a pipeline also 2 and 3); offload: where DeepSpeed keeps the optimizer's state, on
    the ``device``, in ``cpu`` memory or, of zero_stage 3, in files on a local ``nvme`` disk, in the
    folder offload_path.

    overlap: exchange gradients while the backward pass goes on, and parameters while the next
    forward pass does. timeout_minutes: how long processes wait for one that does not answer.
    """

    tensor: int = setting(1, minimum=1)
    sequence: bool = False
    pipeline: int = setting(1, minimum=1)
    virtual_pipeline: int = setting(1, minimum=1)
    expert: int = setting(1, minimum=1)
    micro_batch_size: int = setting(8, minimum=1)
    zero_stage: int = setting(1, minimum=0, maximum=3)
    zero_backend: str = setting("megatron", choices=ZERO_BACKENDS)
    offload: str = setting("device", choices=("device", "cpu", "nvme"))
    offload_path: str | None = None
    overlap: bool = True
    timeout_minutes: float = setting(30, above=0)

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def one_has_all(self) -> bool:
        """Whether a process can use the model without the others, as for a sample."""
        return self.model_size == self.expert == 1 and self.zero_stage < 3
