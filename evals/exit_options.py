"""The options ``--exit`` and those beside it: tokens that leave a loop by themselves."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pretrain.common.errors import UserError

if TYPE_CHECKING:
    from pretrain.inference.exits import ExitRule

NAMES = ("exit", "min_passes", "exit_every", "exit_cache")


def add_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Give a command the options; ``several``: it takes ``--exit`` more than once."""
    group = parser.add_argument_group("depth of recursive models", "see docs/exits.md")
    group.add_argument(
        "--exit",
        action="append" if several else "store",
        help="when a token makes no more passes: latent, cosine, kl, likely-kl, entropy or argmax, "
        "and a threshold, as kl:1e-3 (all passes)",
    )
    group.add_argument("--min-passes", type=int, help="passes that every token makes (1)")
    group.add_argument("--exit-every", type=int, help="passes from one look to the next (1)")
    group.add_argument(
        "--exit-cache",
        help="what later tokens see of one that has left: latest, its last pass in place of deeper "
        "ones, or shared, its last pass at every depth (latest)",
    )


def given_exits(given: argparse.Namespace) -> dict[str, Any]:
    """Return the options that are given, as results record them."""
    values = {name: getattr(given, name) for name in NAMES}
    return {name: value for name, value in values.items() if value is not None}


def exit_rule(options: dict[str, Any]) -> ExitRule | None:
    """Return the rule that options give, None without any. Raises UserError."""
    if not options:
        return None
    # Not above: a command should not wait for torch before its options are read.
    from pretrain.inference.exits import ExitRule

    if "exit" not in options:
        name = next(iter(options))
        raise UserError(f"--{name.replace('_', '-')} is for exits, but there is no --exit")
    return ExitRule.parse(
        options["exit"],
        min_passes=options.get("min_passes"),
        every=options.get("exit_every"),
        cache=options.get("exit_cache", ""),
    )


def mark(options: dict[str, Any]) -> str:
    """Return a suffix of file names that tells results with these options from others."""
    found = "".join(f"-{n.replace('_', '-')}-{options[n]}" for n in NAMES if n in options)
    return found.replace(":", "-")
