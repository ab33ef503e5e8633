"""ParaGRU (ParaRNN, arXiv 2510.21450): a GRU with diagonal recurrence, parallel over time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pretrain.nn.mixers.base import MixerCard, register
from pretrain.nn.mixers.para_rnn import ParaRNNMixer
from pretrain.ops import para_gru


@register("para_gru")
class ParaGRU(ParaRNNMixer):
    """ParaGRU, as a mixer: gates z, r, c; one state."""

    num_states, recurrent_rows, memory_gate_bias = 1, 3, -1.0
    card = MixerCard(
        "ParaGRU",
        "z, r = sigmoid(a h + u); c = tanh(a_c r h + u_c); h' = (1 - z) h + z c, a diagonal",
        "D",
        "Newton's method for the starts of segments",
        "arXiv 2510.21450",
    )

    def cell(
        self, u: Tensor, weights: Tensor, bias: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Run :func:`pretrain.ops.para_gru`."""
        if options["initial_state"] is not None:
            options["initial_state"] = options["initial_state"][:, 0]
        y, state = para_gru(u, weights, bias, **options)
        return y, state[:, None]
