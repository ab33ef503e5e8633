"""Settings that run directories of earlier versions leave unsaid.

Format 1 (without a mark) had fixed default sizes for every mixer, whatever the model's width, and
wrote only those that differed from them. Since format 2 all sizes of a run are written out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pretrain.common.config_loader import LATER, ConfigError

if TYPE_CHECKING:
    from pretrain.config.model import ModelConfig

FORMAT = 2
_SIZES = (
    "num_heads",
    "num_kv_heads",
    "num_qk_heads",
    "num_qk_groups",
    "head_dim",
    "value_dim",
    "state_size",
)
_DEFAULTS_OF_FORMAT_1: dict[str, dict[str, int]] = {
    "attn": {"num_heads": 8},
    "swa": {"num_heads": 8},
    "linear_attn": {"num_heads": 8},
    "retnet": {"num_heads": 8},
    "gla": {"num_heads": 4},
    "hgrn2": {"head_dim": 128},
    "mamba2": {"head_dim": 64, "state_size": 128},
    "deltanet": {"num_heads": 16, "head_dim": 128},
    "gdn": {"num_heads": 6, "head_dim": 256},
    "kda": {"num_heads": 16, "head_dim": 128},
    "delta_product": {"num_heads": 6, "head_dim": 128},
    "m2rnn": {"num_heads": 84, "head_dim": 64, "value_dim": 16},
    "para_gru": {"num_heads": 4},
    "para_lstm": {"num_heads": 4},
    "lstm": {"num_heads": 4},
    "gru": {"num_heads": 4},
    "slstm": {"num_heads": 4},
    "elman": {"num_heads": 4},
    "rat": {"num_heads": 16, "num_qk_groups": 2},
}


def upgrade(model: Any, saved_format: Any, where: str) -> None:
    """Write the sizes that a model was saved without into its plain settings, in place.

    ``saved_format`` is the mark that it was saved with, 1 where there is none. Raises ConfigError
    for a format of a later version.
    """
    if not isinstance(saved_format, int) or not 1 <= saved_format <= FORMAT:
        raise ConfigError(f"{where}: format is {saved_format!r}, expected 1 to {FORMAT}: {LATER}")
    if saved_format == FORMAT or not isinstance(model, dict):
        return
    mixers = model.get("mixers") or {}
    if not isinstance(mixers, dict):
        return  # refused where it is read
    model["mixers"] = mixers = dict(mixers)
    for name in _names(model.get("pattern"), mixers):
        entry = mixers.get(name, {})
        if isinstance(entry, dict):
            defaults = _DEFAULTS_OF_FORMAT_1.get(str(entry.get("kind", name)), {})
            if missing := {k: v for k, v in defaults.items() if k not in entry}:
                mixers[name] = {**entry, **missing}


def keep_saved_sizes(model: ModelConfig, saved: ModelConfig) -> None:
    """Give mixers whose sizes ``model`` does not set those that it was ``saved`` with, in place.

    Does nothing for a model of another width.
    """
    if saved.hidden_size != model.hidden_size:
        return
    mixers = dict(model.mixers)
    for name in _names(model.pattern, mixers):
        entry, before = mixers.get(name, {}), saved.mixers.get(name)
        if not isinstance(entry, dict) or not isinstance(before, dict):
            continue
        if entry.get("kind", name) == before.get("kind", name):
            missing = {k: before[k] for k in _SIZES if k in before and entry.get(k) is None}
            if missing:
                mixers[name] = {**entry, **missing}
    model.mixers = mixers


def _names(pattern: Any, mixers: dict[str, Any]) -> list[str]:
    """Return the mixers that a model names, in its pattern or in its settings."""
    return list(dict.fromkeys([*re.findall(r"[A-Za-z_]\w*", str(pattern)), *mixers]))
