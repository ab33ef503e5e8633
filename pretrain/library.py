"""The functions of the public API: models, layers and trained models in one call each.

See docs/library.md. Nothing here starts a process group or changes the state of the process.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from pretrain.common.config_loader import ConfigError, build_config, nearest
from pretrain.config import ModelConfig
from pretrain.inference.hugging_face import HuggingFaceModel, load_hugging_face
from pretrain.inference.load import LoadedModel, load_model
from pretrain.model import build
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs, check_model
from pretrain.nn.layer import MixerLayer, make_layer
from pretrain.nn.mixers import LayerContext, registry
from pretrain.parallel.context import ParallelContext


def build_model(
    model: str | ModelConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **settings: Any,
) -> LanguageModel:
    """Build an initialised language model from a pattern such as ``"2*(2*gdn attn)"``.

    model: the pattern, or a ModelConfig. settings: fields of ModelConfig, over the config's own
    where one is given; ``vocab_size`` must be set by either. seed: of the weights. dtype: of
    weights and activations. device: torch's default one unless given.

    The model maps tokens ``[B, T]`` int64 to logits ``[B, T, vocab_size]``; with targets
    ``[B, T]`` to each one's cross entropy in nats, ``[B, T]`` float32. Raises ConfigError naming
    the setting, what was found and what was expected.
    """
    if isinstance(model, ModelConfig):
        values = {**dataclasses.asdict(model), **settings}
    else:
        values = {"pattern": model, **settings}
    config = build_config(ModelConfig, values, "build_model")
    check_model(config, "build_model")
    if config.vocab_size is None:
        raise ConfigError("build_model: vocab_size is not set, expected the number of token ids")
    context = ParallelContext(dtype, home=_device(device))
    return build.build_model(config, config.vocab_size, seed=seed, context=context)


def mixer(
    name: str,
    *,
    hidden_size: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    std: float = 0.02,
    **settings: Any,
) -> MixerLayer:
    """Build an initialised sequence mixer, by its name in patterns, as a layer of your own model.

    The layer maps x ``[B, T, hidden_size]`` to ``(y, state)``, y like x. settings: of the mixer,
    see docs/settings.md. std: of its matrices' initial values. Raises ConfigError naming the
    setting, what was found and what was expected.
    """
    known = registry()
    if name not in known:
        raise ConfigError(
            f"mixer: unknown mixer '{name}'{nearest(name, list(known))}; known: {', '.join(known)}"
        )
    model = ModelConfig(pattern=name, hidden_size=hidden_size, mixers={name: settings})
    spec = block_specs(model, "mixer")[0]
    parallel = ParallelContext(dtype, home=_device(device))
    context = LayerContext(hidden_size, std, std, parallel)
    return make_layer(spec.mixer, spec.config, context, seed)


def load(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    averaged: bool = False,
    recurrences: int | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel | HuggingFaceModel:
    """Load a trained model and its tokenizer: a run, one of its checkpoints, or ``hf:NAME``.

    averaged: weights averaged over steps (optimizer.ema_decay). recurrences: passes through the
    loop of a recursive model instead of the configured number. trust_remote_code: of ``hf:``
    models, run the code that comes with one. Raises UserError naming what is wrong.
    """
    if str(source).startswith("hf:"):
        name = str(source).removeprefix("hf:")
        return load_hugging_face(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return load_model(source, dtype=dtype, averaged=averaged, recurrences=recurrences)


def _device(device: torch.device | str | None) -> torch.device:
    return torch.get_default_device() if device is None else torch.device(device)
