"""Processes, tensor-parallel layers and the training engine, on megatron-core.

Import megatron-core only after this package: on a machine without CUDA it has to be adapted first.
"""

import warnings

# megatron-core says four times that it falls back to torch; that is what is wanted here.
warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")

from pretrain.parallel import megatron_on_cpu  # noqa: E402

megatron_on_cpu.install()
