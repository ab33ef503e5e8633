"""The same model at another width, as maximal-update parametrization means it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pretrain.common.config_loader import ConfigError
from pretrain.config import ModelConfig
from pretrain.model.spec import BlockSpec, block_specs


def widened(config: ModelConfig, hidden_size: int, where: str = "config") -> ModelConfig:
    """Return the model ``hidden_size`` wide: more heads of the same size, inner channels in ratio.

    Raises ConfigError naming a number that would not be whole.
    """
    specs = {spec.name: spec for spec in block_specs(config, where)}
    given = config.mixers
    mlp, moe = config.mlp, config.moe
    scale = _Scale(config.hidden_size, hidden_size, where)
    if mlp.intermediate_size is not None:
        inner = scale(mlp.intermediate_size, "model.mlp.intermediate_size")
        mlp = dataclasses.replace(mlp, intermediate_size=inner)
    if moe is not None:
        shared = moe.shared_intermediate_size
        moe = dataclasses.replace(
            moe,
            intermediate_size=scale(moe.intermediate_size, "model.moe.intermediate_size"),
            shared_intermediate_size=scale(shared, "model.moe.shared_intermediate_size"),
        )
    mixers = {
        name: {**given.get(name, {}), **_widened_mixer(spec, scale)} for name, spec in specs.items()
    }
    return dataclasses.replace(
        config, hidden_size=hidden_size, mixers={**given, **mixers}, mlp=mlp, moe=moe
    )


@dataclasses.dataclass
class _Scale:
    old: int
    new: int
    where: str

    def __call__(self, count: int, what: str) -> int:
        if count * self.new % self.old:
            raise ConfigError(
                f"{self.where}: {what} is {count} at model.hidden_size {self.old}, which makes "
                f"{count * self.new / self.old:g} at {self.new}; expected a width that is a "
                f"multiple of {self.old // math.gcd(self.old, count)}"
            )
        return count * self.new // self.old


def _widened_mixer(spec: BlockSpec, scale: _Scale) -> dict[str, Any]:
    settings = dataclasses.asdict(spec.config)
    for name in spec.config.head_counts:
        count = settings.get(name)
        # One head of keys that all heads share remains one.
        if count is not None and not (
            name in ("num_kv_heads", "num_qk_heads") and count == 1 < spec.config.num_heads
        ):
            settings[name] = scale(count, f"model.mixers.{spec.name}.{name}")
    return settings
