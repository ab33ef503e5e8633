"""``python -m pretrain``, but process 1 fails at step 8: it raises, hangs, stops or is killed.

``torchrun --nproc-per-node 2 -m tests.helpers.failing_run KIND CONFIG [key=value ...]``
"""

from __future__ import annotations

import os
import signal
import sys
import time

from pretrain.__main__ import main
from pretrain.data.batches import TrainingBatches

KIND = sys.argv.pop(1)
_micro_batches = TrainingBatches.micro_batches


def micro_batches(self, step, rank=0, size=1, *, offset=0):
    if step == 7 and os.environ["RANK"] == "1":
        if KIND == "raises":
            raise ZeroDivisionError("a reason")
        if KIND == "hangs":
            time.sleep(600)
        os.kill(os.getpid(), {"stops": signal.SIGSTOP, "killed": signal.SIGKILL}[KIND])
    return _micro_batches(self, step, rank, size, offset=offset)


TrainingBatches.micro_batches = micro_batches  # type: ignore[method-assign]

if __name__ == "__main__":
    from pretrain.common.errors import run_command

    run_command(main)
