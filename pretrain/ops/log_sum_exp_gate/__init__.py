"""Weights and decays that make a recurrence a softmax over the past: LightNet, Aaren."""

from pretrain.ops.log_sum_exp_gate.dispatch import log_sum_exp_gate

__all__ = ["log_sum_exp_gate"]
