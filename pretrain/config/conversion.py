"""Runs that begin as another model with other mixers: what ``initialize`` says of their model.

``initialize.keep`` stands for a pattern made from the source's, and a mixer that takes over an
attention layer has that layer's sizes. Both are filled in before settings are checked, from what
the source's checkpoint was saved with. What sizes those are, only mixers know, see
:func:`pretrain.config.converted_sizes.sizes_of_converted`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.checkpoint_folders import FILES_FILE, latest_in
from pretrain.common.config_loader import ConfigError, build_config, check_of, completes, nearest
from pretrain.common.merging import merged
from pretrain.common.run_files import CHECKPOINTS, CONFIG_FILE
from pretrain.config.converted_sizes import SIZES
from pretrain.config.model import ModelConfig
from pretrain.config.pattern import parse_pattern
from pretrain.config.run import InitializeConfig, RunConfig, load_saved_config

ATTENTION = ("attn", "swa", "sliced_attn")  # mixers that others can begin as


@check_of(InitializeConfig)
def _check_checkpoint(initialize: InitializeConfig, where: str, section: str) -> None:
    if initialize.checkpoint.startswith("hf:"):
        name = initialize.checkpoint.removeprefix("hf:")
        raise ConfigError(
            f"{where}: {section}checkpoint is {initialize.checkpoint}, expected a run, which "
            f"'python -m pretrain import {name} runs/NAME' makes of it"
        )


@completes(RunConfig)
def complete_model(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a run's settings with those of its model that ``initialize`` decides on.

    What is set is kept; where the source cannot be read and the pattern is set, nothing changes:
    a run resumes without it. Raises ConfigError where ``keep`` and the pattern contradict.
    """
    section, model = values.get("initialize"), values.get("model") or {}
    if not isinstance(section, dict) or not isinstance(model, dict):
        return values
    initialize = build_config(InitializeConfig, section, where, "initialize")
    if not initialize.convert and initialize.keep is None:
        return values
    source = _source_of(initialize.checkpoint)
    if initialize.keep is not None:
        _one_mixer(initialize, where)
        if source is None and "pattern" not in model:
            raise ConfigError(
                f"{where}: initialize.keep makes the model from initialize.checkpoint, but "
                f"{initialize.checkpoint} holds no checkpoint to read; expected a run directory or "
                "one of its checkpoints, or model.pattern"
            )
        if source is not None:
            model = _kept(initialize, source, model, where)
    if source is not None:
        mixers = dict(model.get("mixers") or {})
        for name, how in initialize.convert.items():
            given = mixers.get(name) or {}
            if how == "qkvo" and isinstance(given, dict):
                for sizes in SIZES:
                    given = sizes(name, given, source, where)
                mixers[name] = given
        model = {**model, "mixers": mixers}
    return {**values, "model": model}


def _source_of(checkpoint: str) -> ModelConfig | None:
    path = Path(checkpoint)
    if not (path / FILES_FILE).is_file():
        found = latest_in(path / CHECKPOINTS) or latest_in(path)
        if found is None:
            return None
        path = found
    try:
        return load_saved_config(path / CONFIG_FILE).model
    except ConfigError:
        return None


def _one_mixer(initialize: InitializeConfig, where: str) -> str:
    if len(initialize.convert) != 1:
        raise ConfigError(
            f"{where}: initialize.convert names {len(initialize.convert)} mixers beside "
            "initialize.keep, expected one, which the other layers become, such as {gdn: qkvo}"
        )
    return next(iter(initialize.convert))


def _kept(
    initialize: InitializeConfig, source: ModelConfig, model: dict[str, Any], where: str
) -> dict[str, Any]:
    """Return the source's settings with another pattern, and what ``model`` sets over them."""
    mixer = _one_mixer(initialize, where)
    pattern = written_pattern(kept_pattern(source, mixer, initialize, where))
    names = {*_names(pattern)} & {*_names(source.pattern)}
    mixers = dict(source.mixers)
    known = {**mixers, **(model.get("mixers") or {})}
    if "pattern" in model and _blocks(str(model["pattern"]), known) != _blocks(pattern, known):
        raise ConfigError(
            f"{where}: model.pattern is '{model['pattern']}', but initialize.keep "
            f"{initialize.keep} makes '{pattern}' of {initialize.checkpoint}; expected one of them "
            "to be left out"
        )
    base = dataclasses.asdict(source)
    base["mixers"] = {name: mixers[name] for name in mixers if name in names}
    return {**merged(base, model), "pattern": pattern}


def kept_pattern(
    source: ModelConfig, mixer: str, initialize: InitializeConfig, where: str
) -> list[str]:
    """Return the mixers of a model whose attention, but in the kept layers, became ``mixer``.

    Raises ConfigError for a kept layer that there is not, or that is no attention.
    """
    names, keep = _blocks(source.pattern, source.mixers), initialize.keep or []
    attention = [i for i, name in enumerate(names) if _kind(source, name) in ATTENTION]
    for layer in keep:
        if layer not in attention:
            found = (
                f"of which block {layer} is {names[layer]}"
                if layer < len(names)
                else f"which has {len(names)} blocks, 0 to {len(names) - 1}"
            )
            raise ConfigError(
                f"{where}: initialize.keep has {layer}, but {initialize.checkpoint} is "
                f"'{source.pattern}', {found}; expected some of its attention layers, "
                f"{', '.join(map(str, attention)) or 'of which it has none'}"
            )
    return [mixer if i in attention and i not in keep else name for i, name in enumerate(names)]


def written_pattern(names: Sequence[str]) -> str:
    """Return the pattern of a list of mixers."""
    runs = [(name, len(list(same))) for name, same in itertools.groupby(names)]
    return " ".join(name if count == 1 else f"{count}*{name}" for name, count in runs)


def check_conversion(config: RunConfig, where: str) -> None:
    """Raise ConfigError where ``initialize.convert`` names what is no mixer of the model."""
    initialize = config.initialize
    if initialize is None:
        return
    if initialize.keep is not None:  # the pattern was made of both
        _one_mixer(initialize, where)
        return
    names = list(dict.fromkeys(_names(config.model.pattern)))
    for name in initialize.convert:
        if name not in names:
            raise ConfigError(
                f"{where}: initialize.convert has '{name}'{nearest(name, names)}, expected mixers "
                f"of model.pattern: {', '.join(names)}"
            )


def _names(pattern: str) -> list[str]:
    return re.findall(r"[A-Za-z_]\w*", pattern)


def _blocks(pattern: str, mixers: dict[str, Any]) -> list[str]:
    """Return the mixers of all blocks; an empty list where the pattern is none."""
    try:
        return parse_pattern(pattern, {*_names(pattern), *mixers})
    except ValueError:
        return []


def _kind(model: ModelConfig, name: str) -> str:
    return str((model.mixers.get(name) or {}).get("kind", name))
