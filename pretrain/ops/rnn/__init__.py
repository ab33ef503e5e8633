"""The classical recurrent cells: elman, gru, lstm, slstm."""

from pretrain.ops.rnn.dispatch import rnn

__all__ = ["rnn"]
