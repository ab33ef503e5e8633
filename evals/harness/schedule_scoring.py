"""Scores under any layout of processes: pipelines, sequence and expert parallelism, ZeRO-3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.data.batches import Batch
from pretrain.data.sequences import Sequences
from pretrain.inference.score import Pair, Prompt, Scorer, merged
from pretrain.training.engine import Engine


class ScheduleScorer(Scorer):
    """By the schedule of training, without states: what requests share is computed for each of
    them, and a text's beginning once more for each of its tokens."""

    def __init__(
        self, engine: Engine, candidates: int, *, filler: int, tokens_per_pass: int, multiple: int
    ) -> None:
        """``filler``: the id that passes are filled up with, behind the text, as a sequence of its
        own; ``multiple``: what the length of a pass must be one of."""
        self.engine, self.candidates, self.filler = engine, candidates, filler
        self.tokens_per_pass, self.multiple = tokens_per_pass, multiple
        self.device = engine.parts[0].context.device

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        found = self._scores(pairs)
        return [
            (float(scores[0].double().sum()), scores[1].tolist() == list(pair.continuation))
            for scores, pair in zip(found, pairs, strict=True)
        ]

    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if any(prompt.temperature for prompt in prompts):
            raise UserError(
                "a task that draws its text at a temperature cannot be scored under a pipeline, "
                "sequence or expert parallelism or ZeRO-3; score the checkpoint afterwards"
            )
        made: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        while running:
            # Scored is any id: what counts is the likeliest in its place.
            pairs = [Pair([*prompts[i].ids, *made[i]], [self.filler]) for i in running]
            for i, scores in zip(running, self._scores(pairs), strict=True):
                made[i].append(int(scores[1, 0]))
            running = [
                i
                for i in running
                if len(made[i]) < prompts[i].max_tokens and not prompts[i].done(made[i])
            ]
        return made

    def _scores(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """``[2, continuation]`` of each pair, on every process."""
        if not pairs:
            return []
        sizes = [len(pair.context) + len(pair.continuation) - 1 for pair in pairs]
        length = -(-max(self.tokens_per_pass, *sizes) // self.multiple) * self.multiple
        groups = _fill(sizes, length)
        rank = parallel_state.get_data_parallel_rank()
        replicas = parallel_state.get_data_parallel_world_size()
        groups += [[]] * (-len(groups) % replicas)  # all go through the model together
        own = groups[rank::replicas]
        batches = [self._batch([pairs[i] for i in group], length) for group in own]
        self.alive()
        parts: dict[int, Tensor] = {}
        for group, scores in zip(own, self._of_last_stage(batches), strict=True):
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
        mask, ends = list[float](), [0]
        for pair in pairs:
            whole = [*pair.context, *pair.continuation]
            tokens += whole[:-1]
            targets += whole[1:]
            mask += [0.0] * (len(pair.context) - 1) + [1.0] * len(pair.continuation)
            ends.append(len(tokens))
        rest = length - len(tokens)
        if rest:
            ends.append(length)
        tokens, targets = tokens + [self.filler] * rest, targets + [self.filler] * rest
        return Batch(
            torch.tensor([tokens]),
            torch.tensor([targets]),
            torch.tensor([mask + [0.0] * rest]),
            Sequences(torch.tensor(ends)),
        )


def _fill(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Numbers of sequences in groups of at most ``length`` tokens, the longest first."""
    groups: list[list[int]] = []
    rooms: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if not groups or sizes[i] > rooms[-1]:
            groups.append([])
            rooms.append(length)
        groups[-1].append(i)
        rooms[-1] -= sizes[i]
    return groups
