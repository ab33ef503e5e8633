"""The recurrences as plain functions, each with its definition and its fast forms.

Every function takes tensors laid out ``[B, T, H, D]``, keeps its recurrent state in float32 or
wider, and resets that state where one of the packed ``sequences`` starts. They are a
:class:`pretrain.data.sequences.Sequences`, or a tensor that one is made of; ``cu_seqlens=`` with
that tensor means the same. Where they are a segment of a row that is divided over ranks, every op
computes on all ranks together what it would on the whole row: ``initial_state`` then counts for the
pieces that begin in the segment, and a final state for those that end there. :func:`miras` and
:func:`plstm` refuse such a segment, and go on from the state of the one before.
"""

from pretrain.ops.attention.dispatch import attention
from pretrain.ops.attention.rotary import apply_rotary, rotary_embedding, rotary_of
from pretrain.ops.delta_rule.dispatch import delta_rule
from pretrain.ops.diagonal_scan.dispatch import diagonal_scan
from pretrain.ops.dplr.dispatch import comba, dplr, gdn2
from pretrain.ops.linear_attention.dispatch import linear_attention
from pretrain.ops.log_sum_exp_gate.dispatch import log_sum_exp_gate
from pretrain.ops.lti.dispatch import dense_lti, lti
from pretrain.ops.m2rnn.dispatch import m2rnn
from pretrain.ops.mesa.dispatch import mesa
from pretrain.ops.miras.dispatch import miras
from pretrain.ops.miras.rule import MirasRule, MirasState
from pretrain.ops.newton.dispatch import newton_recurrence
from pretrain.ops.newton.options import NewtonOptions, NewtonReport
from pretrain.ops.para_rnn.dispatch import para_gru, para_lstm
from pretrain.ops.plstm.dispatch import plstm
from pretrain.ops.rat.dispatch import rat
from pretrain.ops.rat.state import RATState
from pretrain.ops.rnn.dispatch import rnn
from pretrain.ops.shared.arguments import definitions
from pretrain.ops.short_convolution.dispatch import short_convolution

__all__ = [
    "MirasRule",
    "MirasState",
    "NewtonOptions",
    "NewtonReport",
    "RATState",
    "apply_rotary",
    "attention",
    "comba",
    "definitions",
    "delta_rule",
    "dense_lti",
    "diagonal_scan",
    "dplr",
    "gdn2",
    "linear_attention",
    "log_sum_exp_gate",
    "lti",
    "m2rnn",
    "mesa",
    "miras",
    "newton_recurrence",
    "para_gru",
    "para_lstm",
    "plstm",
    "rat",
    "rnn",
    "rotary_embedding",
    "rotary_of",
    "short_convolution",
]
