"""M2RNN: a non-linear recurrence over a matrix state."""

from pretrain.ops.m2rnn.dispatch import m2rnn

__all__ = ["m2rnn"]
