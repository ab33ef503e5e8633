"""Equal budgets: match a grid's members in parameters, FLOPs, tokens or time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from launch.grid import Member
from pretrain.common.config_loader import ConfigError
from pretrain.common.errors import UserError
from pretrain.config import RunConfig
from pretrain.model.counts import ModelCounts, count_model

MATCHES = ("parameters", "flops", "tokens", "time")
_CLOSE = 0.01


def match_members(
    members: Sequence[Member], how: str, where: str, speeds: Mapping[str, float] | None = None
) -> None:
    """Change all members but the first so that they match it in ``how``.

    ``parameters`` changes the intermediate size of the MLPs; ``flops`` and ``time`` change the
    number of training tokens; ``tokens`` equals them. ``speeds`` are in tokens per second by
    member, for ``time``. Raises ConfigError where a member cannot match within 1 %.
    """
    if how not in MATCHES:
        raise ConfigError(f"{where}: grid.match is '{how}', expected one of: {', '.join(MATCHES)}")
    reference = members[0].config
    for member in members[1:]:
        at = f"{where}, member {member.name}"
        if how == "parameters":
            _match_parameters(member.config, reference, at)
        else:
            ratio = 1.0
            if how == "flops":
                first, this = (
                    _full_counts(c, at).training_flops() for c in (reference, member.config)
                )
                ratio = first / this
            elif how == "time" and speeds is not None:
                ratio = speeds[member.name] / speeds[members[0].name]
            _match_tokens(member.config, reference, ratio, how, at)


def counts_of(config: RunConfig) -> ModelCounts:
    """Count a model's parameters and FLOPs, with one embedding row if it sets no vocab_size.

    That suffices to show them, and to compare models whose embeddings are equal.
    """
    return count_model(config.model, config.model.vocab_size or 1, config.train.seq_len)


def _full_counts(config: RunConfig, where: str, *, equal_embeddings: bool = False) -> ModelCounts:
    """Count a model with the embedding rows that the data's tokenizer needs.

    Raises ConfigError where there is no data, unless the models compared have
    ``equal_embeddings``.
    """
    if config.model.vocab_size is not None or equal_embeddings:
        return counts_of(config)
    from pretrain.data.batches import open_data
    from pretrain.model.build import padded_vocab_size

    try:
        tokenizer = open_data(config.data).tokenizer
    except UserError as error:
        raise ConfigError(
            f"{where}: grid.match counts the vocabulary too, but model.vocab_size is not set and "
            f"the data that defines it is missing ({error}); set model.vocab_size"
        ) from None
    rows = padded_vocab_size(config.model, config.data.ids(tokenizer.vocab_size))
    return count_model(config.model, rows, config.train.seq_len)


def _match_parameters(config: RunConfig, reference: RunConfig, where: str) -> None:
    mlp, models = config.model.mlp, (config.model, reference.model)
    equal = len({(m.hidden_size, m.tie_embeddings, m.vocab_size) for m in models}) == 1
    wanted = _full_counts(reference, where, equal_embeddings=equal).parameters

    def parameters() -> int:
        return _full_counts(config, where, equal_embeddings=equal).parameters

    if mlp.kind == "none":
        raise ConfigError(f"{where}: grid.match is parameters, but the model has no MLP to resize")
    unit = config.parallel.tensor
    found = []
    for width in (unit, 2 * unit):  # parameters grow linearly with it
        mlp.intermediate_size = width
        found.append(parameters())
    slope = (found[1] - found[0]) / unit
    if slope == 0:  # every MLP is a mixture of experts
        raise ConfigError(
            f"{where}: grid.match is parameters, but model.mlp.intermediate_size changes no "
            "parameters"
        )
    exact = unit + (wanted - found[0]) / slope
    step = mlp.multiple_of * unit
    while step > unit and step * slope > _CLOSE * wanted:  # small models need finer widths
        step = max(step // 2 // unit, 1) * unit
    mlp.intermediate_size = max(round(exact / step) * step, step)
    reached = parameters()
    if abs(reached / wanted - 1) > _CLOSE:
        raise ConfigError(
            f"{where}: grid.match is parameters, but the closest MLP width, "
            f"{mlp.intermediate_size}, gives {reached:,} parameters and the first member has "
            f"{wanted:,}; expected another model.hidden_size or number of blocks, or another "
            "grid.match"
        )


def _match_tokens(
    config: RunConfig, reference: RunConfig, ratio: float, how: str, where: str
) -> None:
    """Give a run the number of whole batches nearest to ``ratio`` x the reference's tokens."""
    train = config.train
    total = reference.plan.tokens
    exact = ratio * total
    train.steps, train.tokens = None, max(round(exact), 1)
    plan = config.plan
    near = (plan.tokens_before(s) for s in (plan.num_steps - 1, plan.num_steps) if s > 0)
    train.tokens = min(near, key=lambda tokens: abs(tokens - exact))
    if abs(train.tokens / exact - 1) > _CLOSE:
        batch = plan.batch_tokens(plan.num_steps - 1)
        allowed = "as many tokens" if ratio == 1 else f"{exact:,.0f} tokens, {ratio:.4g} x as many"
        # A batch of two hundredths is at most one hundredth from a whole number of them.
        raise ConfigError(
            f"{where}: grid.match is {how}, which asks for {allowed} as the first member's "
            f"{total:,}, but the nearest number of whole batches of {batch:,} tokens has "
            f"{train.tokens:,}, more than {_CLOSE:.0%} off; expected train.global_batch_tokens of "
            f"at most {math.floor(2 * _CLOSE * exact):,}, or a first member of at least "
            f"{math.ceil(batch / (2 * _CLOSE * ratio)):,} tokens"
        )
