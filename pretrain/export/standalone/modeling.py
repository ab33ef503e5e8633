"""A causal language model of mixed layers for transformers; needs torch, numpy and transformers.

Written by ``python -m pretrain export``. The layers' source is below as text; it is made modules of
under the name ``_PACKAGE`` when this file is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

_PACKAGE = "_hybrid_pretrain_package"
_SOURCES: dict[str, str] = {}

# SOURCES


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An importer of modules from ``_SOURCES``."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _PACKAGE and not name.startswith(f"{_PACKAGE}."):
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.removeprefix(_PACKAGE).lstrip(".")
        source, file = _SOURCES.get(name, ""), f"{module.__name__}.py"
        # Triton reads its kernels' source as files are read.
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        exec(compile(source, file, "exec"), vars(module))


if not any(
    type(finder).__name__ == "_Importer" and getattr(finder, "package", "") == _PACKAGE
    for finder in sys.meta_path
):
    importer: Any = _Importer()
    importer.package = _PACKAGE
    sys.meta_path.insert(0, importer)


def _module(name: str) -> Any:
    return importlib.import_module(f"{_PACKAGE}.{name}")


class HybridConfig(PretrainedConfig):
    """The config of a model of mixed layers; ``model`` holds the settings it was trained with."""

    model_type = "hybrid_pretrain"

    def __init__(self, model: dict[str, Any] | None = None, vocab_size: int = 0, **rest: Any):
        super().__init__(**rest)
        self.model = model or {}
        self.vocab_size = vocab_size


class HybridForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of texts that may be padded on either side: padding never reaches a layer."""

    config_class = HybridConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        schema, settings = _module("pretrain.common.config_loader"), _module("pretrain.config")
        language_model = _module("pretrain.model.language_model")
        parallel = _module("pretrain.parallel.context")
        model = schema.build_config(settings.ModelConfig, config.model, "config.json")
        context = parallel.ParallelContext(torch.get_default_dtype())
        self.model = language_model.LanguageModel(model, config.vocab_size, context)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embedding

    def _init_weights(self, module: nn.Module) -> None:
        pass  # weights are always loaded

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Return the arguments of the next forward pass, which computes the full texts."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits ``[B, T, vocab]``, zeros where the mask is 0.

        input_ids, attention_mask: ``[B, T]``; labels: likewise, -100 is not counted. Every call
        computes the full texts.
        """
        if attention_mask is None or bool(attention_mask.all()):
            logits = self.model(input_ids)
        else:
            kept = attention_mask.bool()
            ends = torch.cat([kept.sum(1).new_zeros(1), kept.sum(1).cumsum(0)])
            packed = self.model(input_ids[kept][None], sequences=ends)[0]
            logits = packed.new_zeros(*input_ids.shape, packed.shape[-1])
            logits[kept] = packed
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits)
