"""Parameters that do not learn, by patterns of their names."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.model.freezing import check_matched, matches, stage_without_learning
from pretrain.model.language_model import LanguageModel
from pretrain.parallel.processes import gather


def freeze(stages: Sequence[LanguageModel], patterns: Sequence[str]) -> None:
    """Have the parameters that patterns match need no gradient; every process must call.

    Raises UserError for a pattern that matches nothing, and where a stage has nothing to learn.
    """
    if not patterns:
        return
    found, learns = set[str](), []
    for stage in stages:
        left = 0
        for name, parameter in stage.named_parameters():
            found |= {pattern for pattern in patterns if matches(name, [pattern])}
            parameter.requires_grad_(not matches(name, patterns))
            left += parameter.requires_grad
        learns.append(left > 0)
    everyone = gather((found, all(learns)))
    matched = set().union(*(names for names, _ in everyone))
    check_matched(patterns, matched)
    if not all(learning for _, learning in everyone):
        raise stage_without_learning(patterns)
