"""The recurrences as plain functions: what they compute, then how it is made fast.

Every function takes tensors laid out ``[B, T, H, D]``, keeps its recurrent state in float32 or
wider, and resets that state at the sequence starts that ``cu_seqlens`` names.
"""

from pretrain.ops.arguments import definitions
from pretrain.ops.attention import attention
from pretrain.ops.delta_rule import delta_rule
from pretrain.ops.linear_attention import linear_attention
from pretrain.ops.m2rnn import m2rnn
from pretrain.ops.newton import NewtonReport, newton_recurrence
from pretrain.ops.para_rnn import para_gru, para_lstm
from pretrain.ops.rat import RATState, rat
from pretrain.ops.rnn import rnn
from pretrain.ops.rotary import apply_rotary, rotary_embedding, rotary_of
from pretrain.ops.short_convolution import short_convolution

__all__ = [
    "NewtonReport",
    "RATState",
    "apply_rotary",
    "attention",
    "definitions",
    "delta_rule",
    "linear_attention",
    "m2rnn",
    "newton_recurrence",
    "para_gru",
    "para_lstm",
    "rat",
    "rnn",
    "rotary_embedding",
    "rotary_of",
    "short_convolution",
]
