"""From a model's settings to its list of blocks, without building anything."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pretrain.common.config_loader import ConfigError, build_config, nearest
from pretrain.config import ModelConfig, MoEConfig, RecursionConfig
from pretrain.model.pattern import parse_pattern
from pretrain.nn.mixers import Mixer, registry
from pretrain.nn.mixers.base import SHAREABLE


@dataclass(frozen=True)
class BlockSpec:
    """One block: the mixer's name in the pattern, its class and its settings, and the mixture of
    experts that it has instead of an MLP."""

    name: str
    mixer: type[Mixer]
    config: Any
    moe: MoEConfig | None = None

    @property
    def kind(self) -> str:
        """Blocks of the same kind have the same shapes and cost the same."""
        return f"{self.name}, experts" if self.moe else self.name

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that a trained mixer depends on."""
        settings = dataclasses.asdict(self.config)
        for name in self.mixer.speed_settings:
            settings.pop(name, None)
        return {"mixer": self.mixer.__name__, **settings}


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
    if config.recursion is not None:
        _check_recursion(config.recursion, len(names), f"{where}: model.recursion")
    dense = len(names) if config.moe is None else config.moe.first_dense
    return [
        dataclasses.replace(specs[name], moe=config.moe if index >= dense else None)
        for index, name in enumerate(names)
    ]


def _check_recursion(recursion: RecursionConfig, num_blocks: int, where: str) -> None:
    if recursion.prelude + recursion.coda >= num_blocks:
        raise ConfigError(
            f"{where}: prelude {recursion.prelude} and coda {recursion.coda} leave nothing to loop "
            f"over of the pattern's {num_blocks} blocks"
        )
    if recursion.state_init != "input" and not recursion.adapter:
        raise ConfigError(
            f"{where}.state_init is {recursion.state_init}, which needs adapter=true: the loop "
            "would never see its input"
        )
    if recursion.sampling != "fixed":
        for name, value in (
            ("lora_rank", recursion.lora_rank > 0),
            ("step_signal", recursion.step_signal == "learned"),
            ("halting", recursion.halting),
        ):
            if value:
                raise ConfigError(
                    f"{where}.{name} needs a fixed number of passes, found sampling "
                    f"{recursion.sampling}"
                )
    if recursion.halting and recursion.backprop_last is not None:
        raise ConfigError(
            f"{where}.backprop_last is {recursion.backprop_last}; with halting every pass is part "
            "of the output, expected null"
        )


def check_tensor_parallel(config: ModelConfig, size: int, where: str) -> None:
    """Raise ConfigError unless ``size`` tensor-parallel processes can share the model."""
    counts: dict[str, int] = {}
    for spec in block_specs(config, where):
        for name, count in spec.mixer.divided(spec.config, config.hidden_size).items():
            if count > 1 or name not in SHAREABLE:
                counts[f"model.mixers.{spec.name}: {name}"] = count
    if config.moe is not None and config.moe.shared_intermediate_size:
        counts["model.moe: shared inner channels"] = config.moe.shared_intermediate_size
    if config.mlp.kind != "none" and (config.moe is None or config.moe.first_dense):
        counts["model.mlp: inner channels"] = config.mlp.width(config.hidden_size)
    if config.vocab_size is not None:
        counts["model.vocab_size"] = config.vocab_size
    for name, count in counts.items():
        if count % size:
            common = math.gcd(*counts.values())
            fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise ConfigError(
                f"{where}: parallel.tensor is {size}, which does not divide {count} ({name}); this "
                f"model fits {', '.join(fitting)}"
            )
