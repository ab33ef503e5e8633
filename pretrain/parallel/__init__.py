"""Processes, tensor-parallel layers and the training engine, on megatron-core."""

from pretrain.parallel import cpu as megatron_on_cpu

megatron_on_cpu.install()
