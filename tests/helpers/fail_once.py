"""A callback that fails before one step, the first time it is reached."""

from __future__ import annotations

from pretrain import Callback

STEP = 5


class FailOnce(Callback):
    """Raise before a step, unless a file says that this happened before."""

    def before_step(self):
        path = self.trainer.run_directory.path / "failed-once"
        if self.trainer.state.step == STEP - 1 and not path.exists():
            path.touch()
            raise RuntimeError("a device that fell off its bus")
