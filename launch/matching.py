"""Equal budgets: members of a grid made alike in parameters, FLOPs, tokens or time, so that what
differs between them is what is studied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_prep.config_files import ConfigError
from launch.grid import Member
from pretrain.config import RunConfig
from pretrain.models.blocks import ModelCounts, count_model

MATCHES = ("parameters", "flops", "tokens", "time")
_CLOSE = 0.01


def match_members(
    members: Sequence[Member], how: str, where: str, speeds: Mapping[str, float] | None = None
) -> None:
    """Change all but the first member: ``parameters``, the inner width of its MLPs; ``flops`` and
    ``time``, how many tokens it is trained on; ``tokens``, that they are as many. ``speeds``: in
    tokens per second, for ``time``. Raises ConfigError where that cannot be done to within 1 %."""
    if how not in MATCHES:
        raise ConfigError(f"{where}: grid.match is '{how}', expected one of: {', '.join(MATCHES)}")
    reference = members[0].config
    for member in members[1:]:
        place = f"{where}, member {member.name}"
        if how == "parameters":
            _match_parameters(member.config, counts_of(reference).parameters, place)
        else:
            ratio = 1.0
            if how == "flops":
                a, b = (counts_of(c).training_flops() for c in (reference, member.config))
                ratio = a / b
            elif how == "time" and speeds is not None:
                ratio = speeds[member.name] / speeds[members[0].name]
            _match_tokens(member.config, reference, ratio, place)


def counts_of(config: RunConfig) -> ModelCounts:
    """Without a vocabulary of its own, a model is counted as if there were one row; of members
    that share a tokenizer that makes no difference."""
    return count_model(config.model, config.model.vocab_size or 1, config.train.seq_len)


def _match_parameters(config: RunConfig, wanted: int, where: str) -> None:
    mlp = config.model.mlp
    if mlp.kind == "none":
        raise ConfigError(f"{where}: grid.match is parameters, but the model has no MLP to resize")
    unit = config.parallel.tensor
    found = []
    for width in (unit, 2 * unit):  # parameters grow in a line
        mlp.intermediate_size = width
        found.append(counts_of(config).parameters)
    slope = (found[1] - found[0]) / unit
    if slope == 0:  # every MLP is a mixture of experts
        raise ConfigError(
            f"{where}: grid.match is parameters, but the width of model.mlp changes nothing"
        )
    exact = unit + (wanted - found[0]) / slope
    step = mlp.multiple_of * unit
    while step > unit and step * slope > _CLOSE * wanted:  # small models need finer widths
        step = max(step // 2 // unit, 1) * unit
    mlp.intermediate_size = max(round(exact / step) * step, step)
    reached = counts_of(config).parameters
    if abs(reached / wanted - 1) > _CLOSE:
        raise ConfigError(
            f"{where}: grid.match is parameters, but an MLP of width {mlp.intermediate_size} makes "
            f"{reached:,} parameters, the first member has {wanted:,}"
        )


def _match_tokens(config: RunConfig, reference: RunConfig, ratio: float, where: str) -> None:
    train = reference.train
    wanted = round(ratio * train.tokens_before(train.num_steps))
    if wanted < config.train.global_batch_tokens:
        raise ConfigError(f"{where}: grid.match leaves {wanted} tokens, less than one batch")
    config.train.steps, config.train.tokens = None, wanted
    if ratio != 1:  # whole batches, the nearer number of them
        steps = config.train.num_steps
        below, above = (config.train.tokens_before(s) for s in (steps - 1, steps))
        config.train.tokens = below if wanted - below < above - wanted else above
