"""The options ``--parallel``, ``--wavefront``, ...: several tokens at once by recurrent depth."""

from __future__ import annotations

import argparse
from typing import get_args

from pretrain.common.errors import UserError
from pretrain.inference.wavefront_rules import Criterion, Wavefront

_DEFAULTS = Wavefront()
_NAMES = ("wavefront", "inner", "headway", "criterion", "eps", "steady", "ema", "noise")


def add_parallel_options(parser: argparse.ArgumentParser) -> None:
    """Give a command the options, which without ``--parallel`` are refused."""
    group = parser.add_argument_group(
        "sampling in parallel", "for models with recurrent depth, see docs/depth.md"
    )
    group.add_argument(
        "--parallel",
        action="store_true",
        help="start tokens before the loop has settled on those before, and refine all together",
    )
    group.add_argument(
        "--wavefront",
        type=int,
        help=f"unfinished positions at a time, at most ({_DEFAULTS.wavefront})",
    )
    group.add_argument("--inner", type=int, help=f"passes in each step ({_DEFAULTS.inner})")
    group.add_argument(
        "--headway", type=int, help=f"positions that a step adds ({_DEFAULTS.headway})"
    )
    group.add_argument(
        "--criterion",
        choices=get_args(Criterion),
        help="what makes a position final: little change of its state, the same token for some "
        f"steps, or all passes ({_DEFAULTS.criterion})",
    )
    group.add_argument(
        "--eps", type=float, help=f"latent: the largest relative change ({_DEFAULTS.eps})"
    )
    group.add_argument("--steady", type=int, help="token: the steps (3)")
    group.add_argument(
        "--ema",
        type=float,
        help=f"share of a position's last embedding in the next one ({_DEFAULTS.ema})",
    )
    group.add_argument(
        "--noise",
        type=float,
        help=f"share of noise mixed into a state before each step ({_DEFAULTS.noise})",
    )
    group.add_argument(
        "--constant-noise", action="store_true", help="the same share, however many the passes"
    )
    group.add_argument(
        "--published", action="store_true", help="the published rule of arXiv 2510.14961"
    )


def parallel_of(given: argparse.Namespace) -> Wavefront | None:
    """Return what the options ask for; None: one token after another.

    Raises UserError for an option out of its range, or without ``--parallel``.
    """
    values = {name: getattr(given, name) for name in _NAMES if getattr(given, name) is not None}
    if not given.parallel:
        switches = [n for n in ("constant_noise", "published") if getattr(given, n)]
        for name in [*values, *switches]:
            said = f" is {values[name]}" if name in values else " is given"
            raise UserError(
                f"--{name.replace('_', '-')}{said}, but is for sampling in parallel alone; "
                "expected --parallel as well"
            )
        return None
    if given.checkpoint.startswith("hf:"):
        raise UserError(
            f"--parallel is for models with recurrent depth of runs, not for {given.checkpoint}"
        )
    for option in ("exit", "speculate"):
        if getattr(given, option, None) is not None:
            raise UserError(
                f"--{option} is {getattr(given, option)}, but --parallel has passes of its own; "
                "expected one of them"
            )
    found = Wavefront(**values, dampened=not given.constant_noise, published=given.published)
    found.check("--")
    return found
