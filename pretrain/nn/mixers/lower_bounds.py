"""Forget gates with a lower bound, of HGRN and HGRN2: f = lb + (1 - lb) sigmoid(W_f x).

lb rises with depth: l / L in block l of L at first. Each layer learns its own, through a sigmoid
(0.01 in block 0); or all layers' come from one softmax over depth, and the first is fixed at 0, as
in the paper (arXiv 2311.04823). The L blocks are then those of one kind alone.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.nn.mixers.base import LayerContext, Mixer
from pretrain.nn.mixers.parts import gate_parameter
from pretrain.nn.parameters import constant
from pretrain.nn.shared_tables import TableRow, rising_bound
from pretrain.ops.elementwise.fusing import fused

LowerBound = Literal["own", "shared"]
TABLE = "lower_bounds"


def add_lower_bound(mixer: Mixer, context: LayerContext, kind: LowerBound, width: int) -> None:
    """Give ``mixer`` its lower bounds of ``width`` channels, those of the full layer."""
    if kind == "shared":
        mixer.bounds = context.table_row(TABLE, width)
        return
    share = max(context.index / context.count, 0.01)
    shape = (context.parallel.local(width, "the number of forget gates"),)
    logit = math.log(share / (1 - share))
    mixer.lower_bound = gate_parameter(context.parallel, shape, constant(logit))


def lower_bound_tables(kind: LowerBound, width: int) -> dict[str, int]:
    """Return what a mixer's ``shared_tables`` are."""
    return {TABLE: width} if kind == "shared" else {}


def lower_bound(mixer: Mixer) -> Tensor:
    """Return the logits of this process's lower bounds."""
    bounds: TableRow | None = getattr(mixer, "bounds", None)
    if bounds is not None:
        return rising_bound(bounds(), bounds.row)
    own: Tensor = mixer.get_parameter("lower_bound")
    return own


@fused
def forget_above(gate: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 - f in gate's dtype and log f, f = lb + (1 - lb) sigmoid(gate), of lb's logit.

    Neither form cancels, or reaches log 0.
    """
    dtype, gate = gate.dtype, gate.to(bound.dtype)
    closing = torch.sigmoid(-bound) * torch.sigmoid(-gate)
    opening = torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + F.logsigmoid(gate))
    log_f = torch.where(closing < 0.5, torch.log1p(-closing.clamp_max(0.5)), opening)
    return closing.to(dtype), log_f
