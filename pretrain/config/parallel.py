"""The layout of processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pretrain.common.config_loader import Config, setting

ZeroBackend = Literal["megatron", "deepspeed"]
ZERO_BACKENDS: tuple[ZeroBackend, ...] = get_args(ZeroBackend)


@dataclass
class ParallelConfig(Config):
    """The layout of processes; those beyond tensor x context x pipeline are data-parallel."""

    tensor: int = setting(1, minimum=1)
    """Tensor-parallel size: processes that share every layer by its heads and channels."""
    sequence: bool = False
    """Sequence parallelism: the tensor-parallel processes also share the tokens between layers."""
    context: int = setting(1, minimum=1)
    """Context-parallel size: processes that share the tokens of a micro-batch, each a segment of
    its row, and hand states, keys and values on to each other. For long sequences."""
    context_cells: Literal["auto", "heads", "chain"] = setting("auto")
    """How context-parallel processes compute sequential cells (``lstm``, ``gru``, ``slstm``,
    ``elman``, ``m2rnn``): ``heads``, each some of the heads over the whole row, or ``chain``, one
    after another from the state of the one before. ``auto``: as is planned to be faster on GPUs of
    a known kind, ``chain`` on others, and on CPUs ``heads`` where there are enough."""
    context_scans: Literal["auto", "gather", "ring"] = setting("auto")
    """How context-parallel processes get the states of linear attention's family, delta rules and
    diagonal recurrences: ``gather``, those of all segments at once, or ``ring``, each from the
    process before, which it waits for. A ring sends less, and a delta rule is computed once.
    ``auto``: ``ring`` for two processes, where nobody waits longer for it, else ``gather``."""
    pipeline: int = setting(1, minimum=1)
    """Pipeline stages that the blocks are split into, balanced by their FLOPs."""
    virtual_pipeline: int = setting(1, minimum=1)
    """Parts of every stage that a process goes through in turn (interleaved schedule): less idle
    time, more messages."""
    expert: int = setting(1, minimum=1)
    """Expert-parallel size: data- or context-parallel processes that share a mixture's experts."""
    micro_batch_size: int = setting(8, minimum=1)
    """Sequences per forward pass of one process."""
    zero_stage: int = setting(1, minimum=0, maximum=3)
    """What data-parallel processes shard: 0 nothing, 1 the optimizer's state, 2 gradients too, 3
    parameters too (arXiv 1910.02054)."""
    zero_backend: ZeroBackend = setting("megatron")
    """Who shards: ``megatron`` (stages 0 and 1) or ``deepspeed`` (0 and 1, without a pipeline also
    2 and 3)."""
    offload: Literal["device", "cpu", "nvme"] = setting("device")
    """Where DeepSpeed keeps the optimizer's state: on the device, in host memory or,
    with ``zero_stage: 3``, in files on a local disk."""
    offload_path: str | None = None
    """The folder of those files, with ``offload: nvme`` alone."""
    overlap: bool = True
    """Whether gradients are exchanged during the backward pass, and parameters during the next
    forward pass."""
    timeout_minutes: float = setting(30, above=0)
    """Minutes that processes wait for one that does not answer."""

    @property
    def model_size(self) -> int:
        """Return the number of processes that train on one micro-batch together."""
        return self.weights_size * self.context

    @property
    def weights_size(self) -> int:
        """Return the number of processes that hold one copy of the weights."""
        return self.tensor * self.pipeline

    @property
    def ring_scans(self) -> bool:
        """Return whether scanned states go from one context-parallel process to the next."""
        return self.context_scans == "ring" or (self.context_scans == "auto" and self.context == 2)

    @property
    def one_has_all(self) -> bool:
        """Return whether a process can use the model without the others, as for a sample."""
        return self.weights_size == self.expert == 1 and self.zero_stage < 3

    def describe(self, count: int, what: str = "process") -> str:
        """Return in words how ``count`` processes, or whatever they are called, work together."""
        parts = {
            "tensor-parallel": self.tensor,
            "context-parallel": self.context,
            "pipeline stages": self.pipeline,
            "data-parallel": count // self.model_size,
        }
        shared = [f"{number} {name}" for name, number in parts.items() if number > 1]
        experts = f", experts sharded by {self.expert}" if self.expert > 1 else ""
        plural = "" if count == 1 else "es" if what.endswith("s") else "s"
        processes = f"{count} {what}{plural}"
        return f"{processes} ({' x '.join(shared)}{experts})" if shared else processes
