"""ParaLSTM (ParaRNN, arXiv 2510.21450): an LSTM with diagonal recurrence, parallel over time.

It has coupled gates and peepholes. The forget gate's bias starts at 0 to +1 over the channels, for
its gate keeps where it is high; the public code starts the first gate of either cell at 0 to -1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pretrain.nn.mixers.base import MixerCard, register
from pretrain.nn.mixers.para_rnn import ParaRNNMixer
from pretrain.ops import para_lstm


@register("para_lstm")
class ParaLSTM(ParaRNNMixer):
    """ParaLSTM, as a mixer: gates f, o, z; states cell and h."""

    num_states, recurrent_rows, memory_gate_bias = 2, 5, 1.0
    card = MixerCard(
        "ParaLSTM",
        "f = sigmoid(a_f h + c_f s + u_f); z = tanh(a_z h + u_z); s' = f s + (1 - f) z; "
        "h' = sigmoid(a_o h + c_o s' + u_o) tanh(s'), a and c diagonal",
        "2 D",
        "Newton's method for the starts of segments",
        "arXiv 2510.21450",
    )

    def cell(
        self, u: Tensor, weights: Tensor, bias: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Run :func:`pretrain.ops.para_lstm`."""
        return para_lstm(u, weights[:3], weights[3:], bias, **options)
