"""Derivation of the list of blocks from a model's settings, without building anything."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pretrain.common.config_loader import ConfigError, build_config, check_of, nearest
from pretrain.config import ModelConfig, MoEConfig
from pretrain.config.converted_sizes import sizes_of_converted
from pretrain.config.model_checks import check_loop
from pretrain.config.pattern import parse_pattern
from pretrain.nn.mixers import Mixer, registry
from pretrain.nn.mixers.attention import Attention


@dataclass(frozen=True)
class BlockSpec:
    """One block: the mixer's name in the pattern, its class and its resolved settings.

    ``moe`` is the mixture of experts that the block has instead of an MLP, if any; ``number`` which
    of the blocks of this name it is; ``later`` whether it takes what the first of them hands on;
    ``norm`` where it normalises, as ``block_norm`` says it.
    """

    name: str
    mixer: type[Mixer]
    config: Any
    moe: MoEConfig | None = None
    number: int = 0
    later: bool = False
    norm: str = "pre"

    @property
    def kind(self) -> str:
        """Return a key that is equal for blocks that have the same shapes and cost the same."""
        return f"{self.name}{', later' * self.later}{', experts' * (self.moe is not None)}"

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything that a trained mixer depends on."""
        settings = dataclasses.asdict(self.config)
        for name in self.mixer.speed_settings:
            settings.pop(name, None)
        return {"mixer": self.mixer.__name__, **settings}


@check_of(ModelConfig)
def check_model(config: ModelConfig, where: str, section: str = "model.") -> None:
    """Check the mixers of a model and its loop. Raises ConfigError naming the field."""
    specs = block_specs(config, where, section)
    if config.recursion is None:
        return
    check_loop(config.recursion, len(specs), where, section)
    inside = specs[config.recursion.prelude : len(specs) - config.recursion.coda]
    coordinates = config.recursion.step_signal == "coordinate"
    if coordinates and not any(spec.mixer.counts_tokens for spec in inside):
        names = ", ".join(dict.fromkeys(spec.name for spec in inside))
        raise ConfigError(
            f"{where}: {section}recursion.step_signal is coordinate, but no layer in the loop "
            f"({names}) counts the tokens of a text that is generated; expected one that does, "
            "such as attn"
        )
    if not config.recursion.halting:
        return
    coda = len(specs) - config.recursion.coda
    for spec in specs[coda:]:
        first = next(i for i, other in enumerate(specs) if other.name == spec.name)
        if spec.later and config.recursion.prelude <= first < coda:
            raise ConfigError(
                f"{where}: {section}recursion.halting is true, but {spec.name} blocks behind the "
                "loop take what one in it computes, in a last pass that may be left out; expected "
                "halting=false"
            )


def block_specs(
    config: ModelConfig, where: str = "config", section: str = "model."
) -> list[BlockSpec]:
    """Return the blocks of a model, first to last, with settings checked and sizes resolved.

    Raises ConfigError.
    """
    # A config may change between two calls, and is read often: known by what it says.
    sizes = (config.hidden_size, config.mup_base_hidden_size)
    norms = (config.block_norm, config.block_norms)
    snapshot = repr((config.pattern, *sizes, config.mixers, config.moe, *norms))
    found = _known_specs.get(snapshot)
    if found is None:
        found = _read_specs(config, where, section)
        while len(_known_specs) >= _MOST_KNOWN:
            _known_specs.pop(next(iter(_known_specs)), None)
        _known_specs[snapshot] = found
    return list(found)


_known_specs: dict[str, list[BlockSpec]] = {}
_MOST_KNOWN = 64


def _read_specs(config: ModelConfig, where: str, section: str) -> list[BlockSpec]:
    kinds, settings = _mixer_settings(config, where, section)
    try:
        names = parse_pattern(config.pattern, kinds)
    except ValueError as error:
        raise ConfigError(f"{where}: {section}{error}") from None
    unknown = next((name for name in config.block_norms if name not in kinds), None)
    if unknown is not None:
        raise ConfigError(
            f"{where}: {section}block_norms.{unknown}: unknown mixer"
            f"{nearest(unknown, list(kinds))}; known: {', '.join(kinds)}"
        )
    specs = {}
    for name in dict.fromkeys([*names, *settings]):
        field = f"{where}: {section}mixers.{name}"
        mixer_config = build_config(kinds[name].config_class, settings.get(name, {}), field)
        if name in names:
            try:
                mixer_config = mixer_config.resolve_from(
                    config.mup_base_hidden_size, config.hidden_size
                )
                kinds[name].check(mixer_config, config.hidden_size)
            except ValueError as error:
                raise ConfigError(f"{field}: {error}") from None
        norm = config.block_norms.get(name, config.block_norm)
        specs[name] = BlockSpec(name, kinds[name], mixer_config, norm=norm)
    dense = len(names) if config.moe is None else config.moe.first_dense
    moe = config.moe and dataclasses.replace(config.moe)  # the caller's may change
    blocks, before = [], Counter[str]()
    for index, name in enumerate(names):
        spec, number = specs[name], before[name]
        before[name] += 1
        first = spec.mixer.first_values(spec.config, config.hidden_size)
        kept = moe if index >= dense else None
        later = bool(first) and number > 0
        blocks.append(dataclasses.replace(spec, moe=kept, number=number, later=later))
    return blocks


def _mixer_settings(
    config: ModelConfig, where: str, section: str
) -> tuple[dict[str, type[Mixer]], dict[str, dict[str, Any]]]:
    """Return the mixers that a pattern may name, variants among them, and the settings given."""
    known = registry()
    kinds: dict[str, type[Mixer]] = dict(known)
    settings: dict[str, dict[str, Any]] = {}
    for name, values in config.mixers.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: {section}mixers.{name} is {values!r}, expected a mapping")
        values = dict(values)
        kind = values.pop("kind", name)
        if not isinstance(kind, str) or kind not in known:
            raise ConfigError(
                f"{where}: {section}mixers.{name}: unknown mixer '{kind}'"
                f"{nearest(str(kind), list(known))}; known: {', '.join(known)}"
            )
        kinds[name], settings[name] = known[kind], values
    return kinds, settings


def with_sizes(config: ModelConfig, where: str = "config") -> ModelConfig:
    """Return the same model with every setting of its mixers and its MLP's width written out.

    So a run directory says what its model was, whatever the defaults become. Raises ConfigError.
    """
    mixers = dict(config.mixers)
    for spec in block_specs(config, where):
        mixers[spec.name] = {**mixers.get(spec.name, {}), **dataclasses.asdict(spec.config)}
    mlp = dataclasses.replace(config.mlp, intermediate_size=config.mlp.width(config.hidden_size))
    return dataclasses.replace(config, mixers=mixers, mlp=mlp)


@sizes_of_converted
def converted_settings(
    name: str, given: dict[str, Any], source: ModelConfig, where: str = "config"
) -> dict[str, Any]:
    """Return the settings of a mixer that takes over the attention of ``source``, over ``given``.

    Raises ConfigError where it cannot, or there is none.
    """
    known, kind = registry(), given.get("kind", name)
    if kind not in known:
        raise ConfigError(
            f"{where}: initialize.convert has the unknown mixer '{kind}'"
            f"{nearest(str(kind), list(known))}; known: {', '.join(known)}"
        )
    specs = block_specs(source, "initialize.checkpoint")
    attention = next((spec for spec in specs if issubclass(spec.mixer, Attention)), None)
    if attention is None:
        raise ConfigError(
            f"{where}: initialize.convert.{name} is qkvo, but initialize.checkpoint is "
            f"'{source.pattern}', which has no attention to take it from"
        )
    return {**sizes_taken_over(name, known[kind], attention, source.hidden_size, where), **given}


def sizes_taken_over(
    name: str, mixer: type[Mixer], attention: BlockSpec, hidden_size: int, where: str
) -> dict[str, Any]:
    """Return the settings with which ``mixer``, ``name`` in the pattern, fits an attention layer.

    Raises ConfigError where it has none.
    """
    if mixer.conversion is None:
        able = [name for name, other in registry().items() if other.conversion is not None]
        raise ConfigError(
            f"{where}: initialize.convert.{name} is qkvo, which it cannot take over; expected "
            f"none, or one of the mixers that can: {', '.join(able)}"
        )
    try:
        return mixer.conversion.sizes(dataclasses.asdict(attention.config), hidden_size)
    except ValueError as error:
        raise ConfigError(f"{where}: initialize.convert.{name} is qkvo, but {error}") from None


def passes(config: ModelConfig) -> list[int]:
    """Return how often each block of the pattern is run (the mean, where it is sampled)."""
    num_blocks, recursion = len(block_specs(config)), config.recursion
    if recursion is None:
        return [1] * num_blocks
    looped = num_blocks - recursion.prelude - recursion.coda
    return [1] * recursion.prelude + [recursion.times] * looped + [1] * recursion.coda


def tokens_seen_ahead(config: ModelConfig) -> int:
    """Return at how many of a sequence's first tokens a layer's outputs depend on later ones."""
    return max(spec.mixer.sees_ahead(spec.config) for spec in block_specs(config))
