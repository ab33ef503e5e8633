"""Micro-batches through this process's stages of the model, on megatron-core's schedules."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.data.batch import Batch
from pretrain.ops.chain import is_ring
from pretrain.parallel.cpu import device_scope, importing_megatron, model_scope
from pretrain.parallel.processes import context_group, groups, local_device


def run_schedule(
    modules: Sequence[nn.Module], batches: Sequence[Batch], *, forward_only: bool
) -> Tensor:
    """Run the forward and, unless ``forward_only``, backward passes of micro-batches.

    One process runs them in turn; a pipeline runs 1F1B, a virtual one the interleaved schedule.
    Neighbours of one length go through the schedule together; every process has the same lengths in
    the same order, and a virtual pipeline trains on a multiple of its stages of each in a row.

    ``modules`` are this process's stages, in the order that they are run. Gradients are of the
    summed loss, divided by the global batch's number of counted targets where the modules'
    ``config.finalize_model_grads_func`` does that. Returns the sums of :func:`weighted_losses` over
    these micro-batches, on the last stage; zeros elsewhere.
    """
    total = no_sums(batches)
    groups = [list(g) for _, g in itertools.groupby(batches, lambda b: b.tokens.shape)]
    with contextlib.ExitStack() as stack:
        finish: Callable[[], None] | None = None
        if len(groups) > 1 and not forward_only:
            finish = stack.enter_context(_unfinished_gradients(modules))
        for number, group in enumerate(groups, 1):
            if finish is not None and number == len(groups):
                finish()
            same = _full_rounds(group) if forward_only else group
            for result in _through(_forward_step, modules, same, forward_only):
                total += result["sums"]
    return total


@contextlib.contextmanager
def _unfinished_gradients(modules: Sequence[nn.Module]) -> Iterator[Callable[[], None]]:
    """Have schedules add up gradients that are neither reduced nor divided by targets.

    Yields what makes the next schedule do both for all of them. The modules of a backend that does
    so itself are left as they are.
    """
    config: Any = modules[0].config
    finalize, pause = config.finalize_model_grads_func, config.no_sync_func
    if finalize is None:
        yield lambda: None
        return
    targets: list[Tensor] = []
    paused = contextlib.ExitStack()

    def finish() -> None:
        paused.close()
        config.no_sync_func = pause
        config.finalize_model_grads_func = lambda parts, count, **options: finalize(
            parts, sum(targets, count), **options
        )

    try:
        for function in pause if isinstance(pause, list) else [pause]:
            paused.enter_context(function())
        config.no_sync_func = contextlib.nullcontext
        config.finalize_model_grads_func = lambda _, count, **options: targets.append(count)
        yield finish
    finally:
        paused.close()
        config.no_sync_func, config.finalize_model_grads_func = pause, finalize


def score_schedule(
    modules: Sequence[nn.Module], batches: Sequence[Batch], candidates: int
) -> list[Tensor]:
    """Return scores ``[2, M]`` of each micro-batch on the last stage, elsewhere none.

    The first row has the log-likelihoods of the targets that the micro-batch's mask counts, the
    second the likeliest of the first ``candidates`` ids at their positions. All micro-batches must
    be of one length, and as many on every process.
    """

    def step(batches: Iterator[Batch], module: nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches).to(local_device())
        with model_scope():
            scored = torch.nonzero(batch.loss_mask[0]).squeeze(-1)
            output = module(
                batch.tokens,
                batch.targets,
                sequences=batch.sequences,
                scored=scored,
                candidates=candidates,
            )
        return output, lambda scores: (scores.sum(), scores.new_ones((), dtype=torch.int32), scores)

    group = _full_rounds(list(batches))
    found = _through(step, modules, group, forward_only=True, in_segments=False)
    return found[: len(batches)]


def local_part(batch: Batch) -> Batch:
    """Return this process's segment of a micro-batch, all of it without context parallelism."""
    group = context_group()
    if group is None:
        return batch
    return batch.segment(group.rank(), group.size(), group, ring=is_ring(group))


def _through(
    step: Callable[..., Any],
    modules: Sequence[nn.Module],
    group: list[Batch],
    forward_only: bool,
    *,
    in_segments: bool = True,
) -> list[Any]:
    """Run micro-batches of one length through megatron-core's schedule; return what it collects.

    ``in_segments``: whether context-parallel ranks share each of them, or have their own.
    """
    length, context = group[0].tokens.shape[1], context_group()
    if context is not None and not in_segments:
        length *= context.size()  # by which the schedule divides it
    iterators = [iter(group) for _ in modules]
    with device_scope():
        found: list[Any] = _schedules().get_forward_backward_func()(
            forward_step_func=_sent_whole(step) if len(modules) > 1 else step,
            data_iterator=iterators if len(modules) > 1 else iterators[0],
            model=list(modules) if len(modules) > 1 else modules[0],
            num_microbatches=len(group),
            seq_length=length,
            micro_batch_size=1,
            forward_only=forward_only,
        )
    return found


@functools.cache
def _schedules() -> Any:
    """Return megatron-core's schedules, with what they import in their first step."""
    with importing_megatron():
        importlib.import_module("megatron.core.transformer.multi_token_prediction")
        return importlib.import_module("megatron.core.pipeline_parallel")


def _sent_whole(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``step`` so that the memory of an output stays until it has been sent.

    The interleaved schedule frees an output when the next one begins, and only waits for it to be
    sent when the next one is complete: the message could be overwritten. Two outputs are kept, of
    which the older has been sent when a third comes.
    """
    sending: collections.deque[Tensor] = collections.deque(maxlen=2)

    def keeping(*arguments: Any) -> tuple[Tensor, Any]:
        output, collect = step(*arguments)
        with model_scope():
            sending.append(output.detach())  # the same memory, which freeing does not reach
        return output, collect

    return keeping


def _full_rounds(batches: list[Batch]) -> list[Batch]:
    """Pad micro-batches to full rounds of the interleaved schedule, with ones that count nothing.

    A round is as many micro-batches as there are stages.
    """
    state = groups()
    if state.get_virtual_pipeline_model_parallel_world_size() is None:
        return batches
    missing = -len(batches) % state.get_pipeline_model_parallel_world_size()
    last = batches[-1]
    empty = Batch(last.tokens, last.targets, torch.zeros_like(last.loss_mask), last.sequences)
    return batches + [empty] * missing


def _forward_step(batches: Iterator[Batch], module: nn.Module) -> tuple[Tensor, partial[Any]]:
    batch = local_part(next(batches)).to(local_device())
    with model_scope():
        output = module(batch.tokens, batch.targets, **batch.seen)
    return output, partial(_loss, batch=batch)


def _loss(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the summed loss, the number of targets and what to report, for megatron-core."""
    with model_scope():
        total, sums = weighted_losses(losses, batch)
        return total, batch.loss_mask.sum().int(), {"sums": sums}


def no_sums(batches: Sequence[Batch]) -> Tensor:
    """Return zeros to which the sums of :func:`weighted_losses` of these batches add up."""
    hidden = bool(batches) and batches[0].masked is not None
    return torch.zeros(4 if hidden else 2, dtype=torch.float64, device=local_device())


def weighted_losses(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return a micro-batch's summed loss, and what is reported of it, float64.

    That is the summed loss and the number of counted targets, ``[2]``; where tokens are hidden
    those follow with their sum and number, ``[4]``.
    """
    mask, masked = batch.loss_mask, batch.masked
    total, count = (losses * mask).sum(), mask.sum()
    sums = [total.detach(), count]
    if masked is not None:
        total = total + (losses * masked).sum()
        hidden = masked > 0
        sums += [losses.detach()[hidden].sum(), hidden.sum()]
    return total, torch.stack([x.double() for x in sums])
