"""Check which runs can learn from a teacher."""

from __future__ import annotations

from pretrain.common.config_loader import ConfigError
from pretrain.config.run import RunConfig


def check_distill(config: RunConfig, where: str) -> None:
    """Raise ConfigError where ``distill`` is set and something does not go with it."""
    distill, train = config.distill, config.train
    named = [n for n, phase in enumerate(config.phases) if phase.distill is not None]
    if distill is None:
        if named:
            raise ConfigError(
                f"{where}: phases[{named[0]}].distill is set, but distill is null; expected a "
                "distill.teacher"
            )
        return
    found = f"{where}: distill is set"
    for name, value, expected in (
        ("train.segment_tokens", train.segment_tokens, None),
        ("train.carry_state", train.carry_state, False),
        ("data.prefix", None if config.data.prefix is None else "set", None),
    ):
        if value != expected:
            wanted = "null" if expected is None else str(expected).lower()
            raise ConfigError(f"{found} and {name} is {value}, expected {wanted} with a teacher")
    aligned = [p.distill is not None and p.distill.align for p in config.phases]
    for number, aligns in enumerate(aligned):
        if aligns and not all(aligned[:number]):
            raise ConfigError(
                f"{where}: phases[{number}].distill.align is true after a phase that does not "
                "align, expected alignment in the first phases alone"
            )
    if config.parallel.offload == "nvme" and (any(aligned) or aligns_at_first(config)):
        raise ConfigError(
            f"{found} with alignment and parallel.offload is nvme, expected device or cpu, or "
            "distill.align_steps 0"
        )
    if distill.cache is None:
        return
    if train.spikes.policy == "rollback":
        raise ConfigError(
            f"{where}: train.spikes.policy is rollback with a distill.cache, whose tokens a "
            "rollback would skip; expected none or skip, or distill.cache null"
        )
    for number, phase in enumerate(config.phases):
        at = f"phases[{number}]"
        own = phase.distill
        if own is not None and own.align:
            raise ConfigError(
                f"{where}: {at}.distill.align is true with a distill.cache, which has no hidden "
                "states; expected false, or distill.cache null"
            )
        if own is not None and own.temperature not in (None, distill.temperature):
            raise ConfigError(
                f"{where}: {at}.distill.temperature is {own.temperature} with a distill.cache, "
                f"which is of one temperature; expected {distill.temperature}, or distill.cache "
                "null"
            )
    if aligns_at_first(config):
        raise ConfigError(
            f"{where}: distill.align_steps is {distill.align_steps} with a distill.cache, which "
            "has no hidden states; expected 0, or distill.cache null"
        )


def aligns_at_first(config: RunConfig) -> bool:
    """Return whether ``distill.align_steps``, rather than phases, says when blocks are aligned."""
    distill = config.distill
    by_phases = any(p.distill is not None and p.distill.align for p in config.phases)
    return distill is not None and distill.align_steps > 0 and not by_phases
