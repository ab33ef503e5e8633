"""From a model's settings to its list of blocks, without building anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_prep.config_files import ConfigError, build_config, nearest
from pretrain.config import ModelConfig
from pretrain.models.mixers import Mixer, registry
from pretrain.models.mlp import mlp_parameters
from pretrain.models.pattern import parse_pattern


@dataclass(frozen=True)
class BlockSpec:
    """One block: the mixer's name in the pattern, its class, and its settings."""

    name: str
    mixer: type[Mixer]
    config: Any


def block_specs(config: ModelConfig, where: str = "config") -> list[BlockSpec]:
    """The blocks of a model, first to last, every setting checked. Raises ConfigError."""
    known = registry()
    kinds: dict[str, type[Mixer]] = dict(known)
    settings: dict[str, dict[str, Any]] = {}
    for name, values in config.mixers.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: model.mixers.{name} is {values!r}, expected a mapping")
        values = dict(values)
        kind = values.pop("kind", name)
        if not isinstance(kind, str) or kind not in known:
            raise ConfigError(
                f"{where}: model.mixers.{name}: unknown mixer '{kind}'"
                f"{nearest(str(kind), list(known))}; known: {', '.join(known)}"
            )
        kinds[name], settings[name] = known[kind], values
    try:
        names = parse_pattern(config.pattern, kinds)
    except ValueError as error:
        raise ConfigError(f"{where}: model.{error}") from None
    specs = {}
    for name in dict.fromkeys([*names, *settings]):
        place = f"{where}: model.mixers.{name}"
        mixer_config: Any = build_config(kinds[name].config_class, settings.get(name, {}), place)
        if name in names:
            try:
                kinds[name].check(mixer_config, config.hidden_size)
            except ValueError as error:
                raise ConfigError(f"{place}: {error}") from None
        specs[name] = BlockSpec(name, kinds[name], mixer_config)
    return [specs[name] for name in names]


@dataclass(frozen=True)
class ModelCounts:
    """parameters; forward matrix-multiply FLOPs per token; recurrent or cached state in bytes."""

    parameters: int
    embedding_parameters: int
    flops_per_token: int
    state_bytes: int


def count_model(config: ModelConfig, vocab_size: int, seq_len: int) -> ModelCounts:
    """Count a model from its settings alone, for sequences of ``seq_len`` tokens."""
    d, specs = config.hidden_size, block_specs(config)
    mlp = mlp_parameters(config.mlp.kind, d, config.mlp.width(d))
    norms = d * (1 if config.mlp.kind == "none" else 2)
    embedding = vocab_size * d * (1 if config.tie_embeddings else 2)
    counts = [(s.mixer, s.config) for s in specs]
    return ModelCounts(
        parameters=embedding + d + sum(m.num_parameters(c, d) + mlp + norms for m, c in counts),
        embedding_parameters=embedding,
        flops_per_token=2 * vocab_size * d
        + sum(m.flops_per_token(c, d, seq_len) + 2 * mlp for m, c in counts),
        state_bytes=sum(m.state_bytes(c, d, seq_len) for m, c in counts),
    )
