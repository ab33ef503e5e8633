"""Sudden rises of the loss: detecting them, and rolling back to before them."""

from __future__ import annotations

import statistics
from pathlib import Path

from pretrain.checkpoint.state import (
    CheckpointState,
    check_files,
    load_checkpoint,
    read_state,
)
from pretrain.checkpoint_folders import list_checkpoints
from pretrain.config import RunConfig, SpikeConfig
from pretrain.parallel.processes import on_main_process
from pretrain.training.engine import Engine


class SpikeDetector:
    """A comparison of a step's loss with those of the last ``window`` steps.

    ``recent`` is the list that it keeps them in: part of a checkpoint, so that a resumed run
    detects the same spikes.
    """

    def __init__(self, config: SpikeConfig, recent: list[float]):
        self.config, self.recent = config, recent

    def is_spike(self, loss: float) -> bool:
        """Return whether ``loss`` is a spike: never before ``window`` losses are known.

        Every process finds the same.
        """
        if self.config.policy == "none" or len(self.recent) < self.config.window:
            return False
        mean, deviation = statistics.fmean(self.recent), statistics.pstdev(self.recent)
        rise = loss - mean
        return rise > self.config.margin and rise > self.config.deviations * deviation

    def add(self, loss: float) -> None:
        """Remember a loss, even a spike's: where the loss stays high, it soon is no spike."""
        if self.config.policy != "none":
            self.recent.append(loss)
            del self.recent[: -self.config.window]


def roll_back(
    config: RunConfig, engine: Engine, checkpoints: Path, state: CheckpointState
) -> Path | None:
    """Load the newest checkpoint that is ``rollback_steps`` older than the spike at ``state.step``.

    ``state`` is changed to continue from there with data that has not been seen. Returns the
    checkpoint; None, and nothing is changed, where there is no such one. Every process must call.
    """
    spikes, plan, last = config.train.spikes, config.plan, state.step - 1

    def newest() -> Path | None:
        old = (
            p
            for p in list_checkpoints(checkpoints)
            if read_state(p).step <= last - spikes.rollback_steps
        )
        found = next(old, None)
        if found is not None:
            check_files(found)
        return found

    target = on_main_process(newest)
    if target is None:
        return None
    load_checkpoint(target, engine, carried=False)
    engine.forget_carried()  # rows go on elsewhere
    saved = read_state(target)
    skips = [list(skip) for skip in state.offset]
    for phase in plan.phases:  # each goes on with its own data
        first, end = max(phase.first, saved.step), min(phase.last, state.step)
        tokens = plan.tokens_before(end) - plan.tokens_before(first)
        if first <= last < phase.last:
            tokens += spikes.skip_steps * phase.config.train.global_batch_tokens
        if first < end:
            skips.append([first, tokens])
    state.step, state.tokens, state.skipped = saved.step, saved.tokens, saved.skipped
    state.recent_losses[:] = saved.recent_losses
    state.unlogged_loss, state.unlogged_steps = saved.unlogged_loss, saved.unlogged_steps
    state.data_offset, state.skipped_data = sum(tokens for _, tokens in skips), skips
    state.rollbacks += 1
    return target
