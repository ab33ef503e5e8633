"""Check which runs can train with prefixes."""

from __future__ import annotations

from pretrain.common.config_loader import ConfigError
from pretrain.config.run import RunConfig


def check_prefix(config: RunConfig, where: str) -> None:
    """Raise ConfigError where ``data.prefix`` is set and something does not go with it.

    What it asks of the layers is checked with them, see :mod:`pretrain.model.layout`.
    """
    if config.data.prefix is None:
        return
    train, parallel = config.train, config.parallel
    for name, value, expected in (
        ("parallel.context", parallel.context, 1),
        ("train.segment_tokens", train.segment_tokens, None),
        ("train.carry_state", train.carry_state, False),
    ):
        if value != expected:
            wanted = {1: "1", None: "null", False: "false"}[expected]
            raise ConfigError(
                f"{where}: {name} is {str(value).lower()} with data.prefix, whose tokens all of a "
                f"document sees before its first, expected {wanted}"
            )
    if (rows := config.model.vocab_size) is not None and config.data.prefix.hides:
        hidden = config.data.prefix.mask_id
        if hidden is not None and hidden >= rows:
            raise ConfigError(
                f"{where}: data.prefix.mask_id is {hidden}, expected less than model.vocab_size = "
                f"{rows}"
            )
