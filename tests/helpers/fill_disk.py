"""A callback that fills the disk of the run directory before a step between two saves."""

from __future__ import annotations

import contextlib

from pretrain import Callback

STEP = 5


class FillDisk(Callback):
    """Write until nothing more can be written, where a disk is as small as a test's."""

    def before_step(self):
        path = self.trainer.run_directory.path / "fill"
        if self.trainer.state.step == STEP - 1 and not path.exists():
            with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                for _ in range(10_000):
                    file.write(bytes(1024))
