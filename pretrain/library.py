"""The functions of the public API: models, layers and trained models in one call each.

See docs/library.md. Nothing here starts a process group or changes the state of the process.
"""

from __future__ import annotations

import dataclasses
import math
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

import torch

from pretrain.common.config_loader import ConfigError, build_config, nearest
from pretrain.common.dtypes import DTYPES
from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.inference.exits import ExitRule
from pretrain.inference.hugging_face import HuggingFaceModel, load_hugging_face
from pretrain.inference.load import LoadedModel, load_model
from pretrain.model import build
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs, check_model
from pretrain.nn.layer import MixerLayer, make_layer
from pretrain.nn.mixers import LayerContext, registry
from pretrain.parallel.context import ParallelContext

# torch's default device would overrule a context's home unless it is the CPU, on which weights are
# drawn in any case.
_HOME_DECIDES = torch.device("cpu")
_NAMED = {name: dtype for name, dtype in DTYPES.items() if name != "fp8"}  # which trains alone
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def build_model(
    model: str | ModelConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    **settings: Any,
) -> LanguageModel:
    """Build an initialised language model from a pattern such as ``"2*(2*gdn attn)"``.

    model: the pattern, or a ModelConfig. settings: fields of ModelConfig, over the config's own
    where one is given; ``vocab_size`` must be set by either. seed: of the weights. dtype: of
    weights and activations, ``"bf16"`` meaning ``torch.bfloat16``. device: torch's default one
    unless given.

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
    where = "build_model"
    context = ParallelContext(_dtype(where, dtype), home=_device(where, device))
    with _HOME_DECIDES:
        return build.build_model(
            config, config.vocab_size, seed=_seed(where, seed), context=context
        )


def mixer(
    name: str,
    *,
    hidden_size: int,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    std: float = 0.02,
    **settings: Any,
) -> MixerLayer:
    """Build an initialised sequence mixer, by its name in patterns, as a layer of your own model.

    The layer maps x ``[B, T, hidden_size]`` to ``(y, state)``, y like x. settings: of the mixer,
    see docs/settings.md. std: of its matrices' initial values. seed, dtype, device: as in
    :func:`build_model`. Raises ConfigError naming the setting, what was found and what was
    expected.
    """
    known = registry()
    if not isinstance(name, str):
        raise ConfigError(f"mixer: name is {name!r}, expected one of {', '.join(known)}")
    if name not in known:
        raise ConfigError(
            f"mixer: unknown mixer '{name}'{nearest(name, list(known))}; known: {', '.join(known)}"
        )
    if "kind" in settings:
        raise ConfigError(
            f"mixer: unknown setting 'kind', expected the mixer to be named first: mixer('{name}')"
        )
    if isinstance(std, bool) or not isinstance(std, Real) or not 0 <= std < math.inf:
        raise ConfigError(f"mixer: std is {std!r}, expected a number of at least 0")
    values = {"pattern": name, "hidden_size": hidden_size, "mixers": {name: settings}}
    config = build_config(ModelConfig, values, "mixer")
    spec = block_specs(config, "mixer")[0]
    parallel = ParallelContext(_dtype("mixer", dtype), home=_device("mixer", device))
    context = LayerContext(config.hidden_size, float(std), float(std), parallel)
    with _HOME_DECIDES:
        return make_layer(spec.mixer, spec.config, context, _seed("mixer", seed))


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    averaged: bool = False,
    recurrences: int | None = None,
    exits: ExitRule | str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel | HuggingFaceModel:
    """Load a trained model and its tokenizer: a run, one of its checkpoints, or ``hf:NAME``.

    dtype, device: as in :func:`build_model`. averaged: weights averaged over steps
    (optimizer.ema_decay). recurrences: passes through the loop of a recursive model instead of the
    configured number. exits: when a token leaves that loop, such as ``"kl:1e-3"``, or an ExitRule;
    what tokens used is ``.exits.summary()`` then. trust_remote_code: of ``hf:`` models, run the
    code that comes with one. Raises UserError naming what is wrong.
    """
    dtype, home = _dtype("load", dtype), _device("load", device)
    if str(source).startswith("hf:"):
        own = {"averaged": averaged, "recurrences": recurrences, "exits": exits}
        for option, given in own.items():
            if given not in (None, False):
                raise UserError(f"load: {option} is {given}, expected none for {source}")
        name = str(source).removeprefix("hf:")
        with _HOME_DECIDES:
            return load_hugging_face(
                name, dtype=dtype, device=home, trust_remote_code=trust_remote_code
            )
    with _HOME_DECIDES:
        return load_model(
            source,
            dtype=dtype,
            averaged=averaged,
            recurrences=recurrences,
            exits=exits,
            device=home,
        )


def _dtype(where: str, dtype: torch.dtype | str) -> torch.dtype:
    found: Any = dtype
    if isinstance(dtype, str):
        found = _NAMED.get(dtype, getattr(torch, dtype, None))
    if found not in _DTYPES:
        expected = ", ".join([*map(str, _DTYPES), *map(repr, _NAMED)])
        raise ConfigError(f"{where}: dtype is {dtype!r}, expected one of {expected}")
    return cast(torch.dtype, found)


def _device(where: str, device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.get_default_device()
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(
            f"{where}: device is {device!r}, expected one of torch, such as 'cpu' or 'cuda'"
        ) from None


def _seed(where: str, seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ConfigError(f"{where}: seed is {seed!r}, expected a whole number")
    return int(seed)
