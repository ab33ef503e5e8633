"""What tests of ``Trainer`` begin with."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from pretrain.parallel.processes import start_processes, stop_processes
from tests.helpers.training_run import Run


@pytest.fixture
def no_groups():
    """No process group, as in a user's own program; those of other tests are made again."""
    had_groups = dist.is_initialized()
    stop_processes()
    yield
    stop_processes()
    if had_groups:
        start_processes()


@pytest.fixture
def run(tmp_path, corpus):
    return Run(tmp_path, corpus, "run", steps=4)
