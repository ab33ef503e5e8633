"""The command ``python -m pretrain``: train, or check, plan, merge, export or import a run.

``python -m pretrain CONFIG [key=value ...]`` trains, or resumes where the run stopped; ``python -m
pretrain verify CONFIG`` checks that a layout of processes trains the same model; ``python -m
pretrain plan CONFIG`` says what a run will need and cost; ``python -m pretrain coordinates CONFIG``
checks that sizes do not follow the model's width; ``python -m pretrain merge RUN`` averages the
weights of its checkpoints; ``python -m pretrain cache-teacher CONFIG`` writes what a teacher says
of a run's tokens; ``python -m pretrain export CHECKPOINT FOLDER`` and ``import NAME RUN`` convert
to and from Hugging Face; ``python -m pretrain layers`` prints the table of all layers; ``python -m
pretrain replay FILE`` repeats a step that was not finite.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Callable
from typing import NoReturn

from pretrain.common.errors import UserError, run_command
from pretrain.common.garbage import paused_collection
from pretrain.common.quiet import quiet_process
from pretrain.parallel.launcher_watch import watch_launcher

_COMMANDS = {
    "cache-teacher": "pretrain.training.cache_teacher.main",
    "coordinates": "pretrain.training.coordinates.main",
    "export": "pretrain.export.hugging_face.export_command",
    "import": "pretrain.export.importing.import_command",
    "layers": "pretrain.nn.mixers.__main__.main",
    "merge": "pretrain.merge.command.main",
    "plan": "pretrain.planner.report.main",
    "replay": "pretrain.training.replay.main",
    "verify": "pretrain.training.verify.main",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse as everything else is refused: once, where several processes are started."""
        raise UserError(f"{message}; {' '.join(self.format_usage().split())}")


def main() -> int:
    """Run the command; return its exit status."""
    quiet_process()
    parser = _Parser(
        prog="python -m pretrain",
        allow_abbrev=False,  # what is no option is an override
        description="Train a model, or resume where the run stopped. 'python -m pretrain verify "
        "CONFIG' checks that a layout of processes trains the same model as one, 'python -m "
        "pretrain plan CONFIG' estimates what a run will need and cost, 'python -m pretrain "
        "coordinates CONFIG' checks that activations and updates do not follow the model's width, "
        "'python -m pretrain merge RUN' averages the weights of its checkpoints, "
        "'python -m pretrain cache-teacher CONFIG' writes what a teacher says of a run's tokens, "
        "'python -m pretrain export CHECKPOINT FOLDER' writes a Hugging Face model, 'python -m "
        "pretrain import NAME RUN' makes a run of one, 'python -m pretrain layers' prints the "
        "table of all layers, 'python -m pretrain replay FILE' repeats a step that was not finite.",
        epilog="Exit status: 0 done, 2 bad input, 3 a loss that is not finite, "
        "75 stopped by a signal and saved: run the same command again.",
    )
    parser.add_argument("config", help="a run's YAML file, such as configs/runs/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="dotted settings, such as optimizer.lr=3e-4")
    parser.add_argument(
        "--force",
        action="store_true",
        help="train although a check advises against it; the refusal says when this helps",
    )
    if sys.argv[1:2] and sys.argv[1] in _COMMANDS:
        module, _, name = _COMMANDS[sys.argv[1]].rpartition(".")
        command: Callable[[list[str]], int] = getattr(importlib.import_module(module), name)
        return command(sys.argv[2:])
    arguments, extra = parser.parse_known_args()

    overrides = [*arguments.overrides, *extra]
    watch_launcher()  # before imports that take seconds

    with paused_collection():
        from pretrain.config import load_run_config

        load_run_config(arguments.config, overrides)  # refuses bad settings before all is imported

        from pretrain.training.callbacks.garbage import KeepObjects
        from pretrain.training.trainer import Trainer

        trainer = Trainer(
            arguments.config,
            overrides=overrides,
            callbacks=[KeepObjects()],
            force=arguments.force,
        )
    gc.freeze()
    return trainer.fit().exit_status


if __name__ == "__main__":
    run_command(main)
