"""Sequence mixers: one file each. To add one, write its file and name it in the import below."""

from pretrain.nn.mixers import (  # noqa: F401
    attention,
    delta_product,
    deltanet,
    flash_rnn,
    gated_deltanet,
    gated_linear_attention,
    hgrn2,
    kimi_delta_attention,
    linear_attention,
    m2rnn,
    mamba2,
    mlstm,
    mlstm_v1,
    para_gru,
    para_lstm,
    rat,
    retnet,
    sliced_attention,
    sliding_window,
    tcnca,
)
from pretrain.nn.mixers.base import LayerContext, Mixer, State, register, registry

__all__ = ["LayerContext", "Mixer", "State", "register", "registry"]
