"""flash-linear-attention's kernels in Triton's interpreter, for machines without a GPU."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest


def make_interpretable(patch: pytest.MonkeyPatch) -> None:
    """Patch the modules of fla that are imported.

    The interpreter has no timers to tune by, and its loops count with Python's numbers.
    """
    import triton
    from triton.runtime.autotuner import Autotuner

    class Index(int):
        """What a loop counts with: a tensor where kernels are compiled, and here something that
        can at least be cast like one."""

        def to(self, dtype: Any) -> Any:
            return triton.language.cast(int(self), dtype)

    patch.setattr(Autotuner, "_bench", lambda self, *args, config, **meta: (0.0, 0.0, 0.0))
    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            numbers = lambda *ends: map(Index, builtins.range(*map(int, ends)))  # noqa: E731
            patch.setattr(module, "range", numbers, raising=False)
