"""Learning from a teacher's distribution, and from its blocks, beside or instead of the text."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain.common.config_loader import Config, setting


@dataclass
class DistillConfig(Config):
    """Learn from another model that has read the same tokens.

    A training step's loss is ``weight`` times the divergence from the teacher's distribution plus
    1 - ``weight`` times the cross entropy of the text; validation is of the text alone.
    """

    teacher: str
    """A run directory, one of its checkpoints, or ``hf:NAME`` for a Hugging Face model, which is
    imported into the run directory. Its tokenizer must be the data's."""
    weight: float = setting(1.0, minimum=0, maximum=1)
    """Share of the divergence in the loss, the rest of which is cross entropy."""
    temperature: float = setting(1.0, above=0)
    """What both models' logits are divided by in the divergence, which is multiplied by its
    square."""
    reverse: bool = False
    """Whether the divergence is KL(student || teacher) instead of KL(teacher || student)."""
    align_steps: float = setting(0.25, minimum=0, maximum=1)
    """Share of the run's steps, at its beginning, in which mixers that the teacher does not have
    learn alone, each block from the teacher's input and output of it; 0: none. Where a phase names
    ``distill.align``, phases decide."""
    align_weight: float = setting(1.0, above=0)
    """Factor of the loss of those steps, of a token ``|y - teacher's y|^2 / |teacher's y|^2``,
    summed over blocks."""
    freeze: list[str] = field(default_factory=list)
    """Parameters that do not learn, beside those of ``train.freeze``."""
    cache: str | None = None
    """A folder that ``python -m pretrain cache-teacher`` wrote for these settings, from which the
    teacher's likeliest ids are read; null: the teacher runs beside the student."""
    top_k: int = setting(64, minimum=1)
    """How many of the teacher's likeliest ids of each token the cache has."""


@dataclass
class PhaseDistill(Config):
    """How a phase learns from the teacher that ``distill`` names."""

    align: bool = False
    """Whether new mixers learn alone, as for ``distill.align_steps``."""
    weight: float | None = setting(None, minimum=0, maximum=1)
    """As ``distill.weight``; null: that."""
    temperature: float | None = setting(None, above=0)
    """As ``distill.temperature``; null: that."""
    reverse: bool | None = None
    """As ``distill.reverse``; null: that."""
