"""A run in whose third step a number of process 1 is not finite.

``python -m tests.helpers.spoiled_run KIND CONFIG [key=value ...]``, on two processes; KIND is
``again``, or ``once`` where the step is finite when it is run again.
"""

from __future__ import annotations

import math
import sys

import torch.distributed as dist

from pretrain.training.callbacks import Callback
from pretrain.training.trainer import Trainer
from tests.helpers.origin_worker import plant


class Spoil(Callback):
    """Has a number that is not finite come out of a module in one step; ``once``: not again."""

    def __init__(self, step, module, *, rank=0, once=False):
        self.step, self.module, self.rank, self.once, self.handles = step, module, rank, once, []

    def before_step(self):
        if self.trainer.state.step + 1 == self.step and dist.get_rank() == self.rank:
            self.handles = plant(self.trainer.engine, self.module, math.nan)

    def on_work(self, work):
        if self.once and work.startswith("looking"):
            self.forget()

    def after_decision(self, decision):
        self.forget()

    def forget(self):
        for handle in self.handles:
            handle.remove()


if __name__ == "__main__":
    kind, config, *overrides = sys.argv[1:]
    spoil = Spoil(3, "blocks.1.mixer", rank=1, once=kind == "once")
    assert Trainer(config, overrides=overrides, callbacks=[spoil]).fit().status == "completed"
