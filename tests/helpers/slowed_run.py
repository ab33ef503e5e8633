"""``python -m pretrain``, but rank 1 is slow in its forward passes, its data or between steps.

``torchrun --nproc-per-node 3 -m tests.helpers.slowed_run WHERE CONFIG [key=value ...]``
"""

from __future__ import annotations

import os
import sys
import time

from pretrain.__main__ import main
from pretrain.model.language_model import LanguageModel
from pretrain.training.read_ahead import ReadAhead
from pretrain.training.trainer import Trainer

WHERE = sys.argv.pop(1)
SECONDS = 1.0


def slowed(owner, name):
    method = getattr(owner, name)

    def slow(self, *arguments, **options):
        time.sleep(SECONDS)
        return method(self, *arguments, **options)

    setattr(owner, name, slow)


if os.environ["RANK"] == "1":
    owners = {
        "forward": (LanguageModel, "forward"),
        "data": (ReadAhead, "micro_batches"),
        "other": (Trainer, "_decide"),
    }
    slowed(*owners[WHERE])

if __name__ == "__main__":
    from pretrain.common.errors import run_command

    run_command(main)
