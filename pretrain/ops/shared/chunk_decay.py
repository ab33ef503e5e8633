"""Log-decays inside chunks of time: one number per head, or one per key channel.

With G the running sum of a chunk's log-decays, the chunked forms need for rows i and earlier rows j
``pairs_ij = sum_c later_ic earlier_jc exp(G_ic - G_jc)``, and exp(G) itself. Only differences that
are at most 0 are ever exponentiated, so no decay, however strong, can overflow. A log-decay whose
exponential is 0 anyway, -inf included, counts as the first such number: running sums stay exact
where they matter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bounded(log_decay: Tensor) -> Tensor:
    """Return log-decays none of which is less than one whose exponential is 0."""
    return log_decay.clamp_min(-800.0 if log_decay.dtype == torch.float64 else -110.0)


class ScalarDecay:
    """Decays by one number per head: log_decay ``[n, H, Cq]`` of n chunks of Cq tokens.

    Each token has ``substeps`` steps.

    Attributes:
        to_query: ``[n, H, Cq, 1]`` decay from the chunk's start to each token.
        to_step: ``[n, H, C, 1]`` decay from the chunk's start to each step.
        to_end: ``[n, H, C, 1]`` decay from each step to the chunk's end.
        over_chunk: ``[n, H, 1, 1]`` decay over the chunk.
    """

    def __init__(self, log_decay: Tensor, substeps: int):
        token = bounded(log_decay).cumsum(-1)
        step = token if substeps == 1 else token.repeat_interleave(substeps, -1)
        difference = step[..., :, None] - step[..., None, :]
        # Zeros and not -inf above the diagonal, of which exp takes a CPU twice as long.
        self._pairs = difference.tril_().exp_().tril_()  # [n, H, C, C], j <= i
        self._read_pairs = self._pairs[..., substeps - 1 :: substeps, :]  # [n, H, Cq, C]
        self.to_query = token.exp()[..., None]
        self.to_step = step.exp()[..., None]
        self.to_end = (step[..., -1:] - step).exp()[..., None]
        self.over_chunk = step[..., -1].exp()[..., None, None]

    def _of(self, later: Tensor) -> Tensor:
        return self._pairs if later.shape[-2] == self._pairs.shape[-2] else self._read_pairs

    def pairs(self, later: Tensor, earlier: Tensor) -> Tensor:
        """Multiply later ``[n, H, C or Cq, K]`` and earlier ``[n, H, C, K]`` for pairs j <= i."""
        return (later @ earlier.mT).mul_(self._of(later))

    def pairs_backward(
        self, d_pairs: Tensor, later: Tensor, earlier: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of ``later`` and ``earlier``; ``d_pairs`` is overwritten."""
        d_pairs.mul_(self._of(later))
        return d_pairs @ earlier, d_pairs.mT @ later

    def from_start(self, matrix: Tensor, k: Tensor) -> Tensor:
        """Return ``matrix @ (to_step * k)``; ``matrix`` ``[n, H, C, C]`` is overwritten."""
        return matrix.mul_(self.to_step.mT) @ k

    def reduce(self, gradient: Tensor) -> Tensor:
        """Sum a gradient per key channel to one per log-decay."""
        return gradient.sum(-1)


class VectorDecay:
    """Decays by key channel: log_decay ``[n, H, Cq, K]``, Cq a power of two.

    Attributes are as in :class:`ScalarDecay` with K in place of the last 1. Pairs are found by
    halving: at each level the later half of a block meets its earlier half, both measured from the
    boundary between them, so that every level is one batched matrix product.
    """

    def __init__(self, log_decay: Tensor, substeps: int):
        token = bounded(log_decay).cumsum(-2)
        self._substeps, self._tokens = substeps, token.shape[-2]
        self.to_query = token.exp()
        self.to_step = self.to_query.repeat_interleave(substeps, -2)
        self.to_end = (token[..., -1:, :] - token).exp().repeat_interleave(substeps, -2)
        self.over_chunk = token[..., -1, :].exp()[..., None]
        self._levels: list[tuple[int, Tensor, Tensor]] = []
        half = 1
        while half < self._tokens:
            blocks = token.unflatten(-2, (-1, 2, half))
            boundary = blocks[..., 0, -1:, :]
            after = (blocks[..., 1, :, :] - boundary).exp_()  # [n, H, blocks, half, K]
            before = (boundary - blocks[..., 0, :, :]).exp_()
            self._levels.append((half, after, before))
            half *= 2

    def _halves(self, x: Tensor, half: int) -> Tensor:
        """View ``[n, H, tokens * rows, K]`` as ``[n, H, blocks, 2, half, rows, K]``."""
        return x.unflatten(-2, (-1, 2, half, x.shape[-2] // self._tokens))

    def _block(self, pairs: Tensor, half: int) -> Tensor:
        """Return the view of ``pairs`` that a level fills.

        Its shape is ``[n, H, blocks, half * rows, half * s]``.
        """
        rows, columns = pairs.shape[-2] // self._tokens, self._substeps
        view = pairs.unflatten(-1, (-1, 2, half * columns)).unflatten(2, (-1, 2, half * rows))
        return view[:, :, :, 1, :, :, 0, :].diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)

    def _within_token(self, pairs: Tensor) -> Tensor:
        """Return the view of pairs within one token: ``[n, H, tokens, rows, s]``."""
        rows, columns = pairs.shape[-2] // self._tokens, self._substeps
        view = pairs.unflatten(-1, (-1, columns)).unflatten(2, (-1, rows))
        return view.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)

    def pairs(self, later: Tensor, earlier: Tensor) -> Tensor:
        """Compute :meth:`ScalarDecay.pairs` for decays per channel."""
        pairs = later.new_zeros(*later.shape[:-1], earlier.shape[-2])
        for half, after, before in self._levels:
            a = (self._halves(later, half)[:, :, :, 1] * after[..., None, :]).flatten(3, 4)
            b = (self._halves(earlier, half)[:, :, :, 0] * before[..., None, :]).flatten(3, 4)
            self._block(pairs, half).copy_(a @ b.mT)
        a, b = (x.unflatten(2, (self._tokens, -1)) for x in (later, earlier))
        diagonal = self._within_token(pairs)
        if diagonal.shape[-2:] == (1, 1):
            diagonal.copy_((a * b).sum(-1)[..., None])
        else:
            diagonal.copy_(a @ b.mT if diagonal.shape[-2] == 1 else (a @ b.mT).tril())
        return pairs

    def pairs_backward(
        self, d_pairs: Tensor, later: Tensor, earlier: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute :meth:`ScalarDecay.pairs_backward` for decays per channel."""
        diagonal = self._within_token(d_pairs)
        if diagonal.shape[-2] > 1:
            diagonal = diagonal.tril()
        a, b = (x.unflatten(2, (self._tokens, -1)) for x in (later, earlier))
        if diagonal.shape[-2:] == (1, 1):
            d_later, d_earlier = (diagonal * b).flatten(2, 3), (diagonal * a).flatten(2, 3)
        else:
            d_later, d_earlier = (diagonal @ b).flatten(2, 3), (diagonal.mT @ a).flatten(2, 3)
        for half, after, before in self._levels:
            block = self._block(d_pairs, half)
            after, before = after[..., None, :], before[..., None, :]
            a = (self._halves(later, half)[:, :, :, 1] * after).flatten(3, 4)
            b = (self._halves(earlier, half)[:, :, :, 0] * before).flatten(3, 4)
            into = self._halves(d_later, half)[:, :, :, 1]
            into += (block @ b).view_as(into) * after
            into = self._halves(d_earlier, half)[:, :, :, 0]
            into += (block.mT @ a).view_as(into) * before
        return d_later, d_earlier

    def from_start(self, matrix: Tensor, k: Tensor) -> Tensor:
        """Compute :meth:`ScalarDecay.from_start` for decays per channel."""
        return matrix @ (self.to_step * k)

    def reduce(self, gradient: Tensor) -> Tensor:
        """Compute :meth:`ScalarDecay.reduce` for decays per channel."""
        return gradient


def chunk_decay(log_decay: Tensor, substeps: int) -> ScalarDecay | VectorDecay:
    """Return the decay of log-decays ``[n, H, Cq]`` or ``[n, H, Cq, K]``."""
    return (ScalarDecay if log_decay.ndim == 3 else VectorDecay)(log_decay, substeps)


def chunk_tokens(chunk_size: int, substeps: int, longest: int, per_channel: bool) -> int:
    """Return the tokens per chunk.

    There are at most ``chunk_size`` sub-steps and no more than the longest sequence, but a power of
    two where decays are per channel.
    """
    tokens = min(chunk_size // substeps, max(longest, 1))
    return 1 << (tokens - 1).bit_length() if per_channel else tokens


def rows_after(x: Tensor) -> Tensor:
    """Return ``[n, H, C, ...]`` with the row of the next token in each place, zeros in the last."""
    return F.pad(x[:, :, 1:], (0, 0, 0, 1))


def rows_before(x: Tensor, first: float = 0.0) -> Tensor:
    """Return ``[n, H, C, ...]`` with the row of the token before, ``first`` in the first place."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0), value=first)
