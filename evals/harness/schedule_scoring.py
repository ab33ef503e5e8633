"""Score under any parallel layout: pipelines, sequence and expert parallelism, ZeRO-3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.data.batch import Batch
from pretrain.data.sequences import Sequences
from pretrain.inference.score import Pair, Prompt, Scorer, merged
from pretrain.parallel.processes import replica_rank_and_size
from pretrain.training.engine import Engine


class ScheduleScorer(Scorer):
    """Score by the training schedule, without recurrent states.

    Shared prefixes are computed for each request, and a generated text again for each of its
    tokens.
    """

    def __init__(
        self, engine: Engine, candidates: int, *, filler: int, tokens_per_pass: int, multiple: int
    ) -> None:
        """Create a scorer of ``engine`` over the first ``candidates`` ids of the vocabulary.

        ``filler`` is the id that fills up a pass after the text, as a sequence of its own; the
        length of a pass is a multiple of ``multiple``.
        """
        self.engine, self.candidates, self.filler = engine, candidates, filler
        self.tokens_per_pass, self.multiple = tokens_per_pass, multiple
        self.device = engine.parts[0].context.device

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood in nats, and whether it is the greedy one."""
        found = self._scores(pairs)
        return [
            (float(scores[0].double().sum()), scores[1].tolist() == list(pair.continuation))
            for scores, pair in zip(found, pairs, strict=True)
        ]

    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the greedily generated ids of each prompt; raises UserError for sampled ones."""
        if any(prompt.temperature for prompt in prompts):
            raise UserError(
                "a task that samples its text at a temperature cannot be scored under pipeline, "
                "sequence or expert parallelism or ZeRO-3; score the checkpoint afterwards"
            )
        made: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        while running:
            # Any id will do as the last target: only the likeliest one at its position is used.
            pairs = [Pair(prompts[i].ids, [*made[i], self.filler]) for i in running]
            for i, scores in zip(running, self._scores(pairs), strict=True):
                made[i].append(int(scores[1, -1]))
            running = [
                i
                for i in running
                if len(made[i]) < prompts[i].max_tokens and not prompts[i].done(made[i])
            ]
        return made

    def _scores(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """Return ``[2, continuation]`` scores of each pair, on every rank."""
        if not pairs:
            return []
        sizes = [len(pair.context) + len(pair.continuation) - 1 for pair in pairs]
        length = -(-max(self.tokens_per_pass, *sizes) // self.multiple) * self.multiple
        groups = _fill(sizes, length)
        rank, replicas = replica_rank_and_size()
        groups += [[]] * (-len(groups) % replicas)  # all ranks run the model equally often
        local = groups[rank::replicas]
        batches = [self._batch([pairs[i] for i in group], length) for group in local]
        self.alive()
        parts: dict[int, Tensor] = {}
        for group, scores in zip(local, self._of_last_stage(batches), strict=True):
            each = scores.split([len(pairs[i].continuation) for i in group], dim=1)
            parts.update(zip(group, each, strict=True))
        return merged(parts, len(pairs))

    def _of_last_stage(self, batches: list[Batch]) -> list[Tensor]:
        scores: list[list[Tensor]] = [
            [s.cpu() for s in self.engine.score(batches, self.candidates)]
        ]
        group = parallel_state.get_pipeline_model_parallel_group()
        if dist.get_world_size(group) > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast_object_list(scores, src=last, group=group)
        return scores[0]

    def _batch(self, pairs: list[Pair], length: int) -> Batch:
        tokens, targets = list[int](), list[int]()
        mask, ends, prefixes = list[float](), [0], list[int]()
        for pair in pairs:
            ids = [*pair.context, *pair.continuation]
            tokens += ids[:-1]
            targets += ids[1:]
            mask += [0.0] * (len(pair.context) - 1) + [1.0] * len(pair.continuation)
            ends.append(len(tokens))
            prefixes.append(min(len(pair.context), len(ids) - 1))
        rest = length - len(tokens)
        if rest:
            ends.append(length)
            prefixes.append(0)
        tokens, targets = tokens + [self.filler] * rest, targets + [self.filler] * rest
        return Batch(
            torch.tensor([tokens]),
            torch.tensor([targets]),
            torch.tensor([mask + [0.0] * rest]),
            Sequences(torch.tensor(ends)).with_prefixes(prefixes),
        )


def _fill(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Group sequences, by index, into groups of at most ``length`` tokens, the longest first."""
    groups: list[list[int]] = []
    rooms: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if not groups or sizes[i] > rooms[-1]:
            groups.append([])
            rooms.append(length)
        groups[-1].append(i)
        rooms[-1] -= sizes[i]
    return groups
