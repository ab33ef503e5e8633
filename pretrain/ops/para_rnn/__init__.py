"""ParaGRU and ParaLSTM: gated cells with diagonal recurrent weights."""

from pretrain.ops.para_rnn.dispatch import para_gru, para_lstm

__all__ = ["para_gru", "para_lstm"]
