"""Sequence mixers: one file each. To add one, write its file and name it in the import below."""

from pretrain.nn.mixers import (  # noqa: F401
    aaren,
    attention,
    comba,
    delta_product,
    deltanet,
    flash_rnn,
    gated_deltanet,
    gated_deltanet2,
    gated_linear_attention,
    hgrn,
    hgrn2,
    jrt,
    kimi_delta_attention,
    lightnet,
    linear_attention,
    m2rnn,
    mamba,
    mamba2,
    mamba3,
    mesa,
    mlstm,
    para_gru,
    para_lstm,
    quasi_lstm,
    rat,
    retnet,
    rwkv7,
    s4,
    s4d,
    sliding_window,
)
from pretrain.nn.mixers.base import LayerContext, Mixer, State, register, registry

__all__ = ["LayerContext", "Mixer", "State", "register", "registry"]
