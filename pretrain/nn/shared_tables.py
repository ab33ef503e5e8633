"""Tables that a model keeps for all blocks of one kind, each of which reads it by its row."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pretrain.nn.parameters import (
    DescribedModule,
    ParameterInfo,
    constant,
    describe,
    tensor_shard,
)
from pretrain.parallel.context import ParallelContext


class SharedTable(DescribedModule):
    """A table ``[rows, width]``: zeros at first, float32 or wider, without weight decay.

    Tensor-parallel ranks divide its width.
    """

    def __init__(self, parallel: ParallelContext, rows: int, width: int, name: str):
        super().__init__()
        dtype = torch.promote_types(parallel.dtype, torch.float32)
        values = torch.empty(rows, parallel.local(width, name), dtype=dtype, device=parallel.device)
        info = ParameterInfo(constant(0.0), weight_decay=False, shard=tensor_shard(parallel, 1))
        self.weight = describe(nn.Parameter(values), info)

    def forward(self) -> Tensor:
        """Return this rank's part of the table; a copy, so that ZeRO-3 may take the memory back."""
        return self.weight.clone()


class TableRow(nn.Module):
    """A mixer's access to a table: the whole of it, and which row is the mixer's.

    The model owns the table. A mixer outside of a model (``table`` is None) has one of one row.
    """

    def __init__(self, table: SharedTable | None, row: int, alone: SharedTable | None = None):
        super().__init__()
        self.row = row
        self._shared = (table,)  # in a tuple, so that it is no parameter of the mixer
        if table is None:
            self.table = alone

    def forward(self) -> Tensor:
        """Return this rank's part of the table ``[rows, width]``, with gradients."""
        shared = self._shared[0]
        table = cast(SharedTable, self.table if shared is None else shared)
        return cast(Tensor, table())


def rising_bound(table: Tensor, row: int) -> Tensor:
    """Return the logit of a row's lower bound for forget gates (HGRN, arXiv 2311.04823).

    The bound of row l is ``sum of P_m over 1 <= m <= l`` where P is the softmax of ``table [L, D]``
    over its rows: l / L at first. That of row 0 is 0, whose logit is given as -1e30.
    """
    if row == 0:
        return table[0] * 0 - 1e30
    others = torch.cat([table[:1], table[row + 1 :]])
    return table[1 : row + 1].logsumexp(0) - others.logsumexp(0)
