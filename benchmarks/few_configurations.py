"""Let Triton's autotuner try two configurations of a kernel instead of up to dozens.

    python -m benchmarks.few_configurations MODULE [ARGUMENT ...]
    python -m pytest -p benchmarks.few_configurations ...

flash-linear-attention compiles every configuration of every kernel before it measures them, which
is minutes on a new machine. Tried are those nearest to 4 warps and 3 pipeline stages, Triton's own
defaults, so its times here are at most as good as those after full tuning.
"""

from __future__ import annotations

import functools
import runpy
import sys
from typing import Any

import pytest

MOST = 2
WARPS, STAGES = 4, 3  # a Triton kernel's where nothing is said


def ordinary(configurations: list[Any], most: int = MOST) -> list[Any]:
    """Return the ``most`` configurations nearest to Triton's defaults, in their order."""
    ranks = sorted(
        range(len(configurations)),
        key=lambda i: (
            abs(configurations[i].num_warps - WARPS) + abs(configurations[i].num_stages - STAGES)
        ),
    )
    return [configurations[i] for i in sorted(ranks[:most])]


def limit_autotuning() -> None:
    """Let every autotuner of this process, made before or after, try few configurations."""
    # Here, for whether kernels are interpreted is settled when Triton is imported.
    from triton.runtime.autotuner import Autotuner

    pruned = Autotuner.prune_configs
    if hasattr(pruned, "__wrapped__"):
        return

    @functools.wraps(pruned)
    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        return ordinary(pruned(self, kwargs))

    Autotuner.prune_configs = prune_configs


def pytest_configure(config: pytest.Config) -> None:
    """Limit the autotuners of a run of tests, in each of its processes."""
    limit_autotuning()


def main() -> None:
    """Run a module as ``python -m`` does."""
    if len(sys.argv) < 2:
        raise SystemExit("expected the name of a module to run, and its arguments")
    limit_autotuning()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
