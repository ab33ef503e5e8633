"""Check which runs can carry states from step to step."""

from __future__ import annotations

from pretrain.common.config_loader import ConfigError
from pretrain.config.run import RunConfig


def check_carried(config: RunConfig, where: str) -> None:
    """Raise ConfigError where ``train.carry_state`` is set and something does not go with it.

    What it asks of the layers is checked with them, see :mod:`pretrain.model.layout`.
    """
    train, parallel, recursion = config.train, config.parallel, config.model.recursion
    if not train.carry_state:
        if train.carry_state_noise:
            raise ConfigError(
                f"{where}: train.carry_state_noise is {train.carry_state_noise} without "
                "train.carry_state, expected 0, or carry_state=true"
            )
        return
    sampling = "fixed" if recursion is None else recursion.sampling
    offsets = 0 if recursion is None else recursion.position_offsets
    exits = 0.0 if recursion is None or recursion.coda == 0 else recursion.exit_weight
    for name, value, expected, why in (
        ("train.batch_warmup_steps", train.batch_warmup_steps, 0, "the same rows in every step"),
        ("train.segment_tokens", train.segment_tokens, None, "rows computed as a whole"),
        ("model.recursion.sampling", sampling, "fixed", "a state for every pass"),
        ("model.recursion.position_offsets", offsets, 0, "positions that go on"),
        ("model.recursion.exit_weight", exits, 0, "a coda that is passed once"),
        *(
            [("parallel.tensor", parallel.tensor, 1, "all heads where noise is drawn")]
            if train.carry_state_noise
            else []
        ),
    ):
        if value != expected:
            wanted = "null" if expected is None else expected
            noise = " and carry_state_noise set" if name == "parallel.tensor" else ""
            raise ConfigError(
                f"{where}: train.carry_state is true{noise} with {name} {value}, expected "
                f"{wanted}: carried states need {why}"
            )
