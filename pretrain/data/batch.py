"""A micro-batch: tokens, what is predicted of them, and the sequences that they are packed of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences, segment_of, without_waiting
from pretrain.data.teacher_top import TeacherTop


@dataclass
class Batch:
    """One micro-batch, all sequences packed in a row of T tokens.

    Attributes:
        tokens: ``[1, T]`` int64.
        targets: ``[1, T]`` int64, the token after each.
        loss_mask: ``[1, T]`` float32, 1 where the target counts.
        sequences: The documents, or pieces of documents, that the row is packed of.
        continues: Where rows read on from step to step: of each, whether its first document is that
            in which the same row of the step before ended.
        masked: ``[1, T]`` float32, the weight of a token that the inputs hide and the targets have:
            the loss of prefixes, see :mod:`.prefixes`; None where there is none.
        top: What a teacher said of the tokens, ids and log-probabilities ``[1, T, k]`` and the rest
            ``[1, T]``, where it is read from a cache.
    """

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    sequences: Sequences
    continues: tuple[bool, ...] | None = None
    masked: Tensor | None = None
    top: TeacherTop | None = None

    @property
    def seen(self) -> dict[str, Any]:
        """Return what a model is given beside tokens and targets."""
        return {"sequences": self.sequences, "mask": self.loss_mask, "top": self.top}

    @property
    def cu_seqlens(self) -> Tensor:
        """Return ``[N + 1]`` int64: 0, then where each of the N sequences ends."""
        return self.sequences.cu_seqlens

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``, without waiting for it."""
        return self._changed(
            lambda x: without_waiting(x, device), self.sequences.to(device), self.continues
        )

    def segment(self, rank: int, size: int, group: Any = None, *, ring: bool = False) -> Batch:
        """Return segment ``rank`` of ``size`` of the row; see :func:`.segment_of`."""
        sequences = segment_of(self.sequences, rank, size, group, ring=ring)
        length = sequences.num_tokens
        return self._changed(lambda x: x[:, rank * length : (rank + 1) * length], sequences)

    def pinned(self) -> Batch:
        """Return the batch in pinned memory, from which :meth:`to` copies at once."""
        return self._changed(Tensor.pin_memory, self.sequences.pinned(), self.continues)

    def _changed(
        self,
        function: Callable[[Tensor], Tensor],
        sequences: Sequences,
        continues: tuple[bool, ...] | None = None,
    ) -> Batch:
        tokens, targets, mask = map(function, (self.tokens, self.targets, self.loss_mask))
        masked = None if self.masked is None else function(self.masked)
        top = self.top
        if top is not None:
            top = TeacherTop(*(function(x) for x in vars(top).values()))
        return Batch(tokens, targets, mask, sequences, continues, masked, top)
