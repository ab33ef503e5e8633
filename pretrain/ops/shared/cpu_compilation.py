"""Loops compiled for this machine's CPU by numba, which brings its own compiler.

Imported only where such a loop runs: numba takes a while to import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core.compiler import Compiler

# Code on the disk is taken for as long as the file of the function is the same: whoever changes
# these, or the flags below, changes those files too. Sums may be reordered and multiplied into
# additions; NaN and infinities stay what they are.
_FLOATS = {"contract", "reassoc", "nsz"}


class _NoAlias(Compiler):
    """Compile a function whose array arguments never write what another one reads or writes.

    The same array may be given twice where different elements are touched through each argument.
    LLVM then vectorises without comparing addresses, which it gives up for more than a few arrays.
    """

    def define_pipelines(self) -> Any:
        self.state.flags.noalias = True
        return super().define_pipelines()


def compiled(function: Callable[..., Any], *, noalias: bool = False) -> Any:
    """Compile a function at its first call, without the GIL, and keep the code on disk.

    That is beside the source, or in the user's folder of caches where that cannot be written to;
    where neither can, every process compiles anew.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": _FLOATS, "error_model": "numpy"}
    if noalias:
        options["pipeline_class"] = _NoAlias
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder to write to
        return numba.njit(function, **options)
