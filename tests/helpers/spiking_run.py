"""``python -m pretrain CONFIG``, but some of the data is noise: sample 80 of the run and those of
its step."""

from __future__ import annotations

import torch

from pretrain.__main__ import main
from pretrain.data.batches import TrainingBatches

_batch = TrainingBatches._batch
SPOILED = range(80, 84)  # the samples of step 21, four to a step


def batch(self, mix, indices, offset):
    found = _batch(self, mix, indices, offset)
    if set(indices) & set(SPOILED):
        generator = torch.Generator().manual_seed(0)
        found.targets.random_(0, 300, generator=generator)
    return found


TrainingBatches._batch = batch  # type: ignore[method-assign]

if __name__ == "__main__":
    from pretrain.common.errors import run_command

    run_command(main)
