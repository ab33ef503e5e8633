"""megatron-core's configuration of our models, and its marks on parameters.

megatron-core is imported where it is needed: building, counting and exporting models need none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pretrain.parallel.context import ParallelContext
from pretrain.parallel.cpu import importing_megatron

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def transformer_config(
    context: ParallelContext, hidden_size: int | None = None
) -> TransformerConfig:
    """Return megatron-core's configuration of this process; its process groups must exist.

    ``hidden_size``: of what the stages of a pipeline send each other.
    """
    with importing_megatron():
        from megatron.core import parallel_state
        from megatron.core.transformer.transformer_config import TransformerConfig

    size = context.tensor_size
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    parts = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return TransformerConfig(
        num_layers=stages * (parts or 1),  # required there, as are the heads; not used by us
        hidden_size=hidden_size or size,
        num_attention_heads=size,
        tensor_model_parallel_size=size,
        context_parallel_size=context.context_size,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=parts,
        # Two messages between the same two processes in one batch get mixed up.
        batch_p2p_comm=parts is None,
        overlap_p2p_comm=parts is not None,
        # Else the host waits for the GPU after every exchange, for a fault of an older torch.
        batch_p2p_sync=False,
        # What has been sent; run_schedule keeps what is still being sent.
        deallocate_pipeline_outputs=stages > 1,
        sequence_parallel=context.sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=context.dtype,
        pipeline_dtype=context.dtype,
        bf16=context.dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
    )


def prepare(parts: Sequence[Any]) -> TransformerConfig:
    """Set on this process's stages what megatron-core's schedules and data parallel look for.

    That is a ``config``, a ``model_type``, and the marks on parameters by which its optimizer knows
    copies, shards and experts. Returns the configuration, which the stages share.
    """
    config = transformer_config(parts[0].context, parts[0].border_width)
    from megatron.core.enums import ModelType

    for part in parts:
        part.config, part.model_type = config, ModelType.encoder_or_decoder
        for parameter in part.parameters():
            _mark(parameter)
    return config


def _mark(parameter: nn.Parameter) -> None:
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    # Optimizers know parameters by these alone, also in their float32 copies.
    tagged: Any = parameter
    info = tagged.info
    if info.shard is not None and not hasattr(parameter, "tensor_model_parallel"):
        # An expert's too: no tensor-parallel rank has a copy that would count twice in norms.
        axis = 0 if info.shard.over == "expert" else info.shard.axis
        set_tensor_model_parallel_attributes(parameter, True, axis, 1)
    if info.shard is not None and info.shard.over == "expert":
        tagged.allreduce = False
    tagged.sequence_parallel = info.sum_gradient
    if info.tied:
        tagged.shared_embedding = True  # all copies' gradients are laid out the same way
        tagged.shared = tagged.ds_pipe_replicated = info.copy


def viewless(x: Tensor) -> Tensor:
    """Return a stage's output as megatron-core's schedules may free it: no view of a tensor."""
    from megatron.core.utils import make_viewless_tensor

    result: Tensor = make_viewless_tensor(x, requires_grad=x.requires_grad, keep_graph=True)
    return result


@functools.cache
def token_dispatcher() -> tuple[type[Any], Callable[[], Any]]:
    """Return megatron-core's all-to-all dispatcher of tokens to experts, and its groups' maker.

    The dispatcher works on a CPU without CUDA too.
    """
    with importing_megatron():
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
        from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    if not torch.cuda.is_available():
        # It makes a stream where there is none, on the class itself.
        MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = _HostStream()
    return MoEAlltoAllTokenDispatcher, get_default_pg_collection


class _HostStream:
    """A stream, and an event on it, where there is nothing to wait for."""

    def wait_stream(self, _: Any) -> None:
        pass

    def record_event(self) -> _HostStream:
        return self

    def synchronize(self) -> None:
        pass
