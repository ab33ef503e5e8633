"""``python -m evals CHECKPOINT``: score a run's latest checkpoint, or the named one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pretrain.common.errors import run_command
from pretrain.common.quiet import quiet_process


def main() -> int:
    """Run the command of ``sys.argv`` and return the exit status."""
    quiet_process()
    commands: dict[str, Callable[[], Callable[[Sequence[str]], int]]] = {
        "chat": _chat,
        "exits": _exits,
        "layers": _layers,
        "paths": _paths,
        "report": _report,
        "sample": _sample,
        "scaling": _scaling,
        "tasks": _tasks,
    }
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in commands:
        return commands[name]()(sys.argv[2:])
    from evals.commands import main as score

    return score(sys.argv[1:])


# Imported one at a time: no command should wait for what only another needs.
def _chat() -> Callable[[Sequence[str]], int]:
    from evals.chat import main

    return main


def _exits() -> Callable[[Sequence[str]], int]:
    from evals.exits import main

    return main


def _layers() -> Callable[[Sequence[str]], int]:
    from evals.layers import main

    return main


def _paths() -> Callable[[Sequence[str]], int]:
    from evals.layer_paths.command import main

    return main


def _report() -> Callable[[Sequence[str]], int]:
    from evals.report.page import main

    return main


def _sample() -> Callable[[Sequence[str]], int]:
    from evals.sampling import main

    return main


def _scaling() -> Callable[[Sequence[str]], int]:
    from evals.scaling.commands import main

    return main


def _tasks() -> Callable[[Sequence[str]], int]:
    from evals.commands import list_tasks

    return list_tasks


if __name__ == "__main__":
    run_command(main)
