"""Names of columns in logs of many programs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pretrain.common.errors import UserError

# Names in small letters, the likeliest first; "re:" begins a pattern. wandb's own _step
# counts calls of its log function, so a step that the run itself logged comes first.
KNOWN: dict[str, tuple[str, ...]] = {
    "step": (
        *("step", "global_step", "train/global_step", "trainer/global_step", "iteration_step"),
        *("iteration", "iterations", "iter", "train_step", "train/step", "num_updates", "update"),
        *("optimizer_step", "steps", "_step"),
    ),
    "lr": (
        *("lr", "learning_rate", "learning-rate", "learning rate", "train/lr"),
        *("train/learning_rate", "train/learning-rate", "optim/lr", "optim/learning_rate"),
        *("optim/learning_rate_group0", "optim/lr (group 0)", "optimizer/lr", "metrics/lr"),
        *("metrics/learning_rate", r"re:lr-\w+(/(pg|group)[01])?"),
    ),
    "loss": (
        *("loss", "train/loss", "train_loss", "training_loss", "train loss", "lm loss", "lm_loss"),
        *("train/lm_loss", "train/lm loss", "train/crossentropyloss", "train/ce loss"),
        *("train/ce_loss", "train/cross_entropy", "metrics/loss", "metrics/train_loss"),
        *("metrics/train/languagecrossentropy", "loss/train/total", "loss/train"),
        *("loss_metrics/global_avg_loss", "global_avg_loss", "train_loss_step"),
        *("train/loss_step", "train/total_loss", "value"),
    ),
    "tokens": (
        *("tokens", "total_tokens", "tokens_seen", "consumed_tokens", "n_tokens_seen"),
        *("num_tokens", "trained_tokens", "train/tokens", "train/tokens_seen"),
        *("throughput/total_tokens", "throughput/total tokens", "num_input_tokens_seen"),
        *("train/num_input_tokens_seen", "time/token", "time/tokens"),
    ),
    "samples": (
        *("consumed samples", "consumed_samples", "consumed_train_samples", "samples"),
        *("time/sample",),
    ),
    # Of a table that holds several runs below each other, and the size of each.
    "name": ("name", "run", "run_name", "run name", "run_id"),
    "parameters": ("parameters", "params", "n_params", "num_parameters"),
}
# What --columns may name, in curves and in tables with a row per run.
OF_CURVES = tuple(KNOWN)
OF_RUNS = (
    *("parameters", "tokens", "loss", "unique_tokens"),
    *("total_parameters", "flops", "name"),
)


def is_known(what: str, name: str) -> bool:
    """Return whether ``name`` is one by which programs log ``what``."""
    return _rank(what, name) is not None


def is_known_tag(what: str, tag: str) -> bool:
    """Return the same of a name in which a file's name has underscores for all signs."""
    return any(re.sub(r"\W", "_", known) == tag.lower() for known in KNOWN[what])


def find_column(what: str, names: Iterable[str], given: Mapping[str, str] | None) -> str | None:
    """Return the one of ``names`` that holds ``what``: the given one, or the likeliest known one.

    A given name that is not there counts as none.
    """
    there = list(names)
    if given and what in given:
        return given[what] if given[what] in there else None
    ranked = [(rank, name) for name in there if (rank := _rank(what, name)) is not None]
    return min(ranked)[1] if ranked else None


def missing_column(where: Any, what: str, names: Iterable[str], given: str | None) -> UserError:
    """Return the error of a file without a column for ``what``."""
    found = ", ".join(names)
    if given is not None:
        return UserError(f"{where}: has no column '{given}', found: {found}")
    return UserError(
        f"{where}: no column is known as the {what}, found: {found}; name it with "
        f"--columns {what}=NAME"
    )


def _rank(what: str, name: str) -> int | None:
    small = name.lower()
    for rank, known in enumerate(KNOWN[what]):
        if small == known or (known[:3] == "re:" and re.fullmatch(known[3:], small)):
            return rank
    return None
