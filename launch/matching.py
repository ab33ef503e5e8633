"""Equal budgets: members of a grid made alike in parameters, FLOPs, tokens or time, so that what
differs between them is what is studied."""

from __future__ import annotations

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
    """Change all but the first member: ``parameters``, the inner width of its MLPs; ``flops`` and
    ``time``, how many tokens it is trained on; ``tokens``, that they are as many. ``speeds``: in
    tokens per second, for ``time``. Raises ConfigError where that cannot be done to within 1 %."""
    if how not in MATCHES:
        raise ConfigError(f"{where}: grid.match is '{how}', expected one of: {', '.join(MATCHES)}")
    reference = members[0].config
    for member in members[1:]:
        place = f"{where}, member {member.name}"
        if how == "parameters":
            _match_parameters(member.config, reference, place)
        else:
            ratio = 1.0
            if how == "flops":
                both = (reference, member.config)
                a, b = (_whole_counts(c, place).training_flops() for c in both)
                ratio = a / b
            elif how == "time" and speeds is not None:
                ratio = speeds[member.name] / speeds[members[0].name]
            _match_tokens(member.config, reference, ratio, place)


def counts_of(config: RunConfig) -> ModelCounts:
    """Without a vocabulary of its own, a model is counted as if there were one row: its own part,
    for showing, and for comparing parameters where embeddings are alike."""
    return count_model(config.model, config.model.vocab_size or 1, config.train.seq_len)


def _whole_counts(config: RunConfig, where: str, *, embeddings_alike: bool = False) -> ModelCounts:
    """With the rows that the tokenizer of the data needs. Raises ConfigError where it is not
    there, unless all that will be compared has the same ``embeddings_alike``."""
    if config.model.vocab_size is not None or embeddings_alike:
        return counts_of(config)
    from pretrain.data.batches import open_data
    from pretrain.model.build import padded_vocab_size

    try:
        rows = padded_vocab_size(config.model, open_data(config.data).tokenizer.vocab_size)
    except UserError as error:
        raise ConfigError(
            f"{where}: grid.match counts the vocabulary too, but model.vocab_size is not set and "
            f"the data that would tell it is not there ({error}); set model.vocab_size"
        ) from None
    return count_model(config.model, rows, config.train.seq_len)


def _match_parameters(config: RunConfig, reference: RunConfig, where: str) -> None:
    mlp, models = config.model.mlp, (config.model, reference.model)
    alike = len({(m.hidden_size, m.tie_embeddings, m.vocab_size) for m in models}) == 1
    wanted = _whole_counts(reference, where, embeddings_alike=alike).parameters

    def parameters() -> int:
        return _whole_counts(config, where, embeddings_alike=alike).parameters

    if mlp.kind == "none":
        raise ConfigError(f"{where}: grid.match is parameters, but the model has no MLP to resize")
    unit = config.parallel.tensor
    found = []
    for width in (unit, 2 * unit):  # parameters grow in a line
        mlp.intermediate_size = width
        found.append(parameters())
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
    reached = parameters()
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
