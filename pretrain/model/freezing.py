"""Which parameters a run's patterns name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from pretrain.common.errors import UserError


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a pattern matches a parameter's name, or that of a module which holds it."""
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)


def check_matched(patterns: Iterable[str], matched: Collection[str]) -> None:
    """Raise UserError for the first of the patterns that is not among those ``matched``."""
    for pattern in patterns:
        if pattern not in matched:
            raise UserError(
                f"train.freeze or distill.freeze has '{pattern}', which matches no parameter; "
                "expected names or patterns such as embedding, blocks.0, blocks.*.mlp"
            )


def stage_without_learning(patterns: Iterable[str]) -> UserError:
    """Return the error of a layout with a stage in which patterns leave nothing to learn."""
    return UserError(
        f"train.freeze and distill.freeze, {', '.join(patterns)}, leave a stage of the model "
        "nothing to learn; expected fewer patterns, or a smaller parallel.pipeline"
    )
