"""The end of the language model: final norm, head, and what is made of its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ModelConfig
from pretrain.nn.linear import VocabParallelEmbedding, column_input
from pretrain.nn.mixers.base import accumulation_dtype
from pretrain.nn.norm import LayerNorm, RMSNorm
from pretrain.nn.parameters import DescribedModule
from pretrain.ops.cross_entropy.linear_cross_entropy import linear_cross_entropy
from pretrain.ops.cross_entropy.sharded_cross_entropy import sharded_cross_entropy
from pretrain.ops.cross_entropy.sharded_divergence import sharded_divergence
from pretrain.ops.cross_entropy.target_scores import target_scores
from pretrain.parallel.collectives import gather_last_axis
from pretrain.parallel.context import ParallelContext


class WithHead(DescribedModule):
    """What a model computes of its last block's output."""

    # Of one process, in the loss; beyond that they are computed piece by piece, and once more in
    # the backward pass. 1 GiB in float32.
    logits_at_once = 2**28
    model_config: ModelConfig
    vocab_size: int
    context: ParallelContext
    embedding: VocabParallelEmbedding
    final_norm: RMSNorm | LayerNorm
    head: nn.Module
    _width: float  # as a multiple of the base model's

    def score(self, x: Tensor, targets: Tensor, candidates: int | None = None) -> Tensor:
        """Return ``[2, M]``: log-likelihoods of ``targets`` ``[M]``, and the likeliest ids.

        Both are for the token after the ones whose hidden rows are x ``[M, d]``; the likeliest is
        among the first ``candidates`` ids.
        """
        return self._score(self._head_rows(x), targets, candidates)

    def next_logits(self, x: Tensor) -> Tensor:
        """Return ``[M, vocab]``, the full vocabulary, after the tokens whose hidden rows are x."""
        logits = nn.functional.linear(self._head_rows(x), self._head_weight)
        return self._capped(gather_last_axis(logits, self.context.group))

    def _head_rows(self, x: Tensor) -> Tensor:
        return column_input(self._head_input(x[:, None]), self.context)[:, 0]

    def _score(self, x: Tensor, targets: Tensor, candidates: int | None) -> Tensor:
        return target_scores(
            x,
            self._head_weight,
            targets,
            candidates=candidates or self.vocab_size,
            tokens_at_once=max(self.logits_at_once // len(self._head_weight), 1),
            group=self.context.group,
            softcap=self.model_config.logit_softcap,
        )

    def _logits(self, x: Tensor) -> Tensor:
        """Return logits ``[T, B, vocab]``, this rank's shard of the vocabulary."""
        x = column_input(self._head_input(x), self.context)
        return self._capped(nn.functional.linear(x, self._head_weight))

    def _head_input(self, x: Tensor) -> Tensor:
        x, scale = self.final_norm(x), self.model_config.logit_scale
        x = x if self._width == 1 else x / self._width
        return x if scale == 1 else x * scale

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.model_config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def _head_weight(self) -> Tensor:
        tied = self.model_config.tie_embeddings
        return cast(Tensor, self.embedding.weight if tied else self.head.weight)

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return losses ``[T, B]`` in nats, of targets ``[T, B]``."""
        rows = self.vocab_size // self.context.tensor_size
        at_once = max(self.logits_at_once // rows, 1)
        z_loss = self.model_config.z_loss_weight if self.training else 0.0
        if targets.numel() <= at_once and z_loss == 0:
            logits = self._logits(x)
            logits = logits.to(accumulation_dtype(logits.dtype))
            return sharded_cross_entropy(logits, targets, self.context.group)
        x = column_input(self._head_input(x), self.context)
        losses = linear_cross_entropy(
            x.flatten(0, 1),
            self._head_weight,
            targets.flatten(),
            tokens_at_once=at_once,
            group=self.context.group,
            softcap=self.model_config.logit_softcap,
            z_loss_weight=z_loss,
        )
        return losses.view_as(targets)

    def _exit_losses(
        self, earlier: Sequence[Tensor], x: Tensor, targets: Tensor, distill: bool
    ) -> Tensor:
        """Return ``[B, T]``: what the outputs ``earlier`` of passes lose, summed over them.

        The cross entropy of targets ``[B, T]``, or with ``distill`` the KL divergence from the
        distributions of the last pass, whose output is x and takes no gradient.
        """
        at_once = max(self.logits_at_once // (self.vocab_size // self.context.tensor_size), 1)
        aims = targets.t().flatten()
        teacher = None
        if distill:
            with torch.no_grad():
                teacher = column_input(self._head_input(x), self.context).flatten(0, 1)
        total: Tensor | float = 0.0
        for state in earlier:
            rows = column_input(self._head_input(state), self.context).flatten(0, 1)
            if teacher is not None:
                pieces = zip(teacher.split(at_once), rows.split(at_once), strict=True)
                # Their logits are computed again in the backward pass, as those of the loss are.
                found = [checkpoint(self._divergence, a, b, use_reentrant=False) for a, b in pieces]
                total = total + torch.cat(found)
                continue
            total = total + linear_cross_entropy(
                rows,
                self._head_weight,
                aims,
                tokens_at_once=at_once,
                group=self.context.group,
                softcap=self.model_config.logit_softcap,
            )
        return cast(Tensor, total).view(targets.t().shape).t()

    def _divergence(self, teacher: Tensor, rows: Tensor) -> Tensor:
        """Return the KL divergence ``[N]`` from the distributions after ``teacher`` ``[N, d]``."""
        with torch.no_grad():
            aim = self._wide_logits(teacher)
        return sharded_divergence(aim, self._wide_logits(rows), self.context.group)

    def _wide_logits(self, rows: Tensor) -> Tensor:
        logits = self._capped(nn.functional.linear(rows, self._head_weight))
        return logits.to(accumulation_dtype(logits.dtype))
