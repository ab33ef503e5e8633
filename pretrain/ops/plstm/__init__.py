"""pLSTM for sequences: linear attention whose state is turned by small matrices."""

from pretrain.ops.plstm.dispatch import plstm

__all__ = ["plstm"]
