"""The rank that keeps the others waiting."""

from __future__ import annotations

import torch.distributed as dist

from pretrain.parallel.processes import gather, groups, world_size
from pretrain.training.callbacks.base import Callback
from pretrain.training.rank_times import ForwardClock, RankTime, slowest_rank
from pretrain.training.result import TrainResult


class NameSlowestRank(Callback):
    """Log the slowest rank with each line of the metrics, and warn of one that is slow by much.

    Compared is what a rank does alone, so that it is not blamed for waiting: its forward passes,
    waiting for its own data, and what it does between steps. Of ranks that talk within a forward
    pass (tensor, context and expert parallelism, ZeRO-3) all are as slow as the slowest of them.
    """

    _clock: ForwardClock | None = None

    def on_train_start(self) -> None:
        """Put clocks on the model, where there is another rank to compare with."""
        if world_size() > 1:
            self._clock = ForwardClock(self.trainer.engine.parts)
            self._seconds = self.trainer.wall_time.seconds()
            self._step = self.trainer.state.step
            self._named: int | None = None

    def on_log(self, metrics: dict[str, float | None]) -> None:
        """Compare the ranks."""
        if self._clock is None:
            return
        trainer, state = self.trainer, groups()
        before, self._seconds = self._seconds, trainer.wall_time.seconds()
        steps = max(trainer.state.step - self._step, 1)
        self._step = trainer.state.step
        spent = {kind: (self._seconds[kind] - before[kind]) / steps for kind in before}
        local = RankTime.local(
            dist.get_rank(),
            0 if state is None else state.get_pipeline_model_parallel_rank(),
            forward=self._clock.take() / steps,
            data=spent["data"],
            other=spent["other"],
        )
        with trainer.wall_time.spent_on("wait"):
            times = gather(local)
        found = slowest_rank(times, sum(spent.values()))
        if found is None:
            return
        metrics["slowest_rank"], metrics["slowest_rank_ratio"] = found.rank, found.ratio
        if found.sentence is not None and found.rank != self._named:
            trainer.log.say(f"warning: step {trainer.state.step}: {found.sentence}")
        self._named = found.rank if found.sentence is not None else None

    def on_fit_end(self, result: TrainResult) -> None:
        """Take the clocks off."""
        if self._clock is not None:
            self._clock.close()

    def on_exception(self, error: BaseException) -> None:
        """Take the clocks off."""
        if self._clock is not None:
            self._clock.close()
