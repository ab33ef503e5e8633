"""Processes, tensor-parallel layers and the training engine, on megatron-core."""

from pretrain.parallel import megatron_on_cpu

megatron_on_cpu.install()
