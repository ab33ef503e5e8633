"""Backends that compute gradients and update weights: megatron-core and DeepSpeed."""
