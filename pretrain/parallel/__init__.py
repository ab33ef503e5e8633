"""Processes, tensor-parallel layers and the training engine, on megatron-core.

Import megatron-core only after this package: on a machine without CUDA it has to be adapted first.
"""

import warnings

# What the libraries warn each other about; nothing that a user of ours could act on.
for message in (
    ".*Transformer Engine and Apex are not installed.*",
    ".*Apex is not installed. Falling back to Torch Norm.*",
    ".*full scope is deprecated. Use empty cuda_graph_scope.*",
    ".*The .grad attribute of a Tensor that is not a leaf.*",
    ".*torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor|_all_gather_base|"
    "_reduce_scatter_base)` is deprecated.*",
):
    warnings.filterwarnings("ignore", message=message)

from pretrain.parallel import megatron_on_cpu  # noqa: E402

megatron_on_cpu.install()
