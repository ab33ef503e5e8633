"""Several processes train the runs of a folder's settings, one after another.

Those of the run ``context`` are also resumed from each of its checkpoints.
"""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

from pretrain.checkpoint_folders import list_checkpoints
from pretrain.config import RunConfig, load_run_config
from pretrain.parallel.processes import stop_processes
from pretrain.run_directory import RunDirectory
from pretrain.training.trainer import Trainer
from tests.helpers.parallel_worker import start


def resume(config: RunConfig) -> None:
    """Go on from every checkpoint but the last, each in a directory of its own."""
    for saved in list_checkpoints(RunDirectory(config.run_directory).checkpoints)[1:]:
        again = copy.deepcopy(config)
        again.directory = f"{config.run_directory}-{saved.name}"
        if dist.get_rank() == 0:
            shutil.copytree(saved, RunDirectory(again.run_directory).checkpoints / saved.name)
        dist.barrier()
        assert Trainer(again).fit().status == "completed", saved.name


def main(folder: Path) -> None:
    for path in sorted(folder.glob("*.yaml")):
        config = load_run_config(path)
        start(config.parallel)
        assert Trainer(config).fit().status == "completed", path.stem
        if path.stem == "context":
            resume(config)
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
