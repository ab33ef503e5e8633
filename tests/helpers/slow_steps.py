"""A callback that makes a run last at least so long, however fast the machine."""

import time

from pretrain import Callback

SECONDS = 0.05


class SlowSteps(Callback):
    """Wait after every step."""

    def after_step(self, result):
        time.sleep(SECONDS)
