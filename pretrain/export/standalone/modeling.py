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
from transformers import Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
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
    """The config of a model of mixed layers.

    ``model`` holds the settings it was trained with; ``vocab_size`` counts the tokenizer's ids, of
    the ``embedding_rows`` of the embedding, which may be more.
    """

    model_type = "hybrid_pretrain"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        vocab_size: int = 0,
        embedding_rows: int | None = None,
        **rest: Any,
    ):
        super().__init__(**rest)
        self.model = model or {}
        self.vocab_size = vocab_size
        self.embedding_rows = embedding_rows or vocab_size


class HybridCache(Cache):
    """A cache of what every layer carries from token to token, of every row: states, or keys.

    It cannot go back to an earlier token, nor be compiled.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, model: Any, rows: int) -> None:
        super().__init__(layers=[])
        self.model, self.rows = model, rows
        self.states: list[dict[str, Tensor]] | None = None
        self.num_tokens = 0  # of each row, padding included

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens of each row have been read, padding included."""
        return self.num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no longest text."""
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the columns of the mask, and where they begin."""
        return self.num_tokens + query_length, 0

    @property
    def is_initialized(self) -> bool:
        """Return whether any token has been read."""
        return self.states is not None

    @property
    def batch_size(self) -> int:
        """Return the number of rows."""
        return self.rows

    @property
    def max_batch_size(self) -> int:
        """Return the number of rows."""
        return self.rows

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the states of some rows, in this order; a row may be kept several times."""
        if self.states is not None:
            self.states = self.model.select_states(self.states, indices)
        self.rows = len(indices)

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        device = next(self.model.parameters()).device
        rows = torch.arange(self.rows, device=device).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def reset(self) -> None:
        """Forget all tokens."""
        self.states, self.num_tokens = None, 0

    def crop(self, max_length: int) -> None:
        """Refuse: what recurrent layers carry cannot go back."""
        raise ValueError("the states of recurrent layers cannot go back to an earlier token")


class HybridForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of texts that may be padded on either side: padding never reaches a layer."""

    config_class = HybridConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True  # no assisted generation

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        schema, settings = _module("pretrain.common.config_loader"), _module("pretrain.config")
        language_model = _module("pretrain.model.language_model")
        parallel = _module("pretrain.parallel.context")
        model = schema.build_config(settings.ModelConfig, config.model, "config.json")
        context = parallel.ParallelContext(torch.get_default_dtype())
        self.model = language_model.LanguageModel(model, config.embedding_rows, context)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refuse: the vocabulary is that of the training run."""
        raise ValueError("the embedding of an exported model cannot be exchanged or resized")

    def _init_weights(self, module: nn.Module) -> None:
        pass  # weights are always loaded

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: HybridCache | None = None,
        attention_mask: Tensor | None = None,
        **rest: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the next forward pass: the tokens that the cache has not read."""
        read = 0 if past_key_values is None else past_key_values.get_seq_length()
        names = ("use_cache", "logits_to_keep", "output_hidden_states", "return_dict")
        return {
            "input_ids": input_ids[:, read:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            **{name: rest[name] for name in names if name in rest},
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits ``[B, T, vocab]``, zeros where the mask is 0.

        input_ids ``[B, T]``: the next tokens of every row; attention_mask ``[B, S]``: its last T
        columns are theirs, those before of tokens that ``past_key_values`` has read. A row without
        a token, or padded behind its last one with a cache, is refused. labels ``[B, T]``: -100 is
        not counted. logits_to_keep: only of the last tokens, or of these positions.
        output_hidden_states: the embeddings, each block's output (at each pass of a loop), and the
        last one after the final norm, each ``[B, T, d]``.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("the model takes input_ids, found inputs_embeds")
        if labels is not None and past_key_values is not None:
            raise ValueError("labels are of texts from their beginning, found past_key_values")
        rows, length = input_ids.shape
        with_cache = past_key_values is not None if use_cache is None else use_cache
        kept = _kept(attention_mask, length)
        if kept is not None:
            _check_padding(kept, with_cache)
        cache = past_key_values
        if with_cache and cache is None:
            cache = HybridCache(self.model, rows)
        with _Recording(self.model, bool(output_hidden_states)) as recorded:
            x, states = self._hidden(input_ids, kept, cache)
        if with_cache and cache is not None:
            cache.states, cache.num_tokens = states, cache.num_tokens + length
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = x[:, wanted]
        logits = self.model.next_logits(last.flatten(0, 1)).unflatten(0, last.shape[:2])
        logits = logits[..., : self.config.vocab_size]
        if kept is not None:
            logits = logits * kept[:, wanted, None]
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        hidden = None
        if output_hidden_states:
            found = [_rows(h.transpose(0, 1), kept, rows) for h in recorded.found[:-1]]
            hidden = (*found, self.model.final_norm(x))
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if with_cache else None,
            hidden_states=hidden,
        )
        return output if return_dict is not False else output.to_tuple()

    def _hidden(
        self, tokens: Tensor, kept: Tensor | None, cache: HybridCache | None
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return the last block's output ``[B, T, d]``, zeros of padding, and the states."""
        rows, ends = len(tokens), None
        if kept is not None:
            ends = torch.cat([kept.sum(1).new_zeros(1), kept.sum(1).cumsum(0)])
            tokens = tokens[kept][None]
        states: list[dict[str, Tensor]] = []
        if cache is None:
            x = self.model.hidden_states(tokens, sequences=ends)
        else:
            x, states = self.model.hidden_with_state(tokens, cache.states, sequences=ends)
            x = x.unflatten(0, tokens.shape)
        return _rows(x, kept, rows), states


def _kept(mask: Tensor | None, length: int) -> Tensor | None:
    """Return which of the last tokens are no padding ``[B, T]``, None where all are none."""
    if mask is None:
        return None
    kept = mask[:, mask.shape[1] - length :].bool()
    return None if bool(kept.all()) else kept


def _check_padding(kept: Tensor, with_cache: bool) -> None:
    if not bool(kept.any(1).all()):
        row = int((~kept.any(1)).nonzero()[0, 0])
        raise ValueError(f"row {row} of attention_mask is padding alone, expected a token")
    if with_cache and not bool(kept[:, -1].all()):
        row = int((~kept[:, -1]).nonzero()[0, 0])
        raise ValueError(
            f"row {row} ends in padding, expected padding on the left: a cache goes on from the "
            "last token"
        )


def _rows(x: Tensor, kept: Tensor | None, rows: int) -> Tensor:
    """Return x ``[1, M, d]`` of the tokens that are no padding, or ``[B, T, d]``, as the latter."""
    if kept is None:
        return x
    spread = x.new_zeros(rows, kept.shape[1], x.shape[-1])
    spread[kept] = x[0]
    return spread


class _Recording:
    """The embeddings ``[T, B, d]`` and the outputs of all blocks of a forward pass, if wanted."""

    def __init__(self, model: Any, wanted: bool) -> None:
        self.found: list[Tensor] = []
        self._modules: list[Any] = [model.embedding, *model.blocks] if wanted else []
        self._scale = model.embedding_factor
        self._hooks: list[Any] = []

    def __enter__(self) -> _Recording:
        self._hooks = [module.register_forward_hook(self._keep) for module in self._modules]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.found.append(output[0] if isinstance(output, tuple) else output * self._scale)
