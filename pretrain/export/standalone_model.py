"""Models of any layers as one file that transformers loads without this project.

The file carries the source of the layers themselves, as text, and makes modules of it in a separate
package. Layers import megatron-core only where there are several processes, so the file needs none
of it. The exported model computes what the trained one did, and a new layer is exported without an
additional line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes
from pretrain.config import ModelConfig, MoEConfig
from pretrain.export.bundling import bundle, moved_into
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs

MODELING_FILE = "modeling_hybrid.py"
MODEL_TYPE = "hybrid_pretrain"
TOKENIZER_FILE, TOKENIZER_CLASS = "tokenization_sentencepiece.py", "SentencePieceText"
_STANDALONE = Path(__file__).parent / "standalone"
_WITHOUT_EXPERTS = {"pretrain.nn.moe": _STANDALONE / "moe.py"}
# Imported only where there are several processes.
_UNUSED = {
    "pretrain",
    "pretrain.parallel",
    "pretrain.parallel.megatron",
    "pretrain.parallel.processes",
}
_LAYERS = "pretrain.nn.mixers"
# What the template of the file asks for.
_ENTRIES = (
    ("pretrain.common.config_loader", "build_config"),
    ("pretrain.config", "ModelConfig"),
    ("pretrain.model.language_model", "LanguageModel"),
    ("pretrain.parallel.context", "ParallelContext"),
)


def write_standalone_model(
    folder: Path,
    model: LanguageModel,
    seq_len: int,
    eod_id: int,
    dtype: torch.dtype,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Write the code into ``folder``; return config.json.

    ``tokens``: ids that the tokenizer has, of the rows of the embedding; None: all.
    """
    config = model.model_config
    write_bytes(folder / MODELING_FILE, modeling_source(config).encode())
    module = MODELING_FILE.removesuffix(".py")
    specs = block_specs(config)
    used = {spec.name for spec in specs}
    mixers = {name: values for name, values in config.mixers.items() if name in used}
    return {
        "architectures": ["HybridForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{module}.HybridConfig",
            "AutoModelForCausalLM": f"{module}.HybridForCausalLM",
        },
        "model": dataclasses.asdict(
            dataclasses.replace(config, dropout=0.0, mixers=mixers, moe=_without_losses(config))
        ),
        "vocab_size": tokens or model.vocab_size,
        "embedding_rows": model.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(specs),
        "max_position_embeddings": seq_len,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _without_losses(config: ModelConfig) -> MoEConfig | None:
    """Return a model's experts without what training adds to its own loss, a sum over tokens."""
    if config.moe is None:
        return None
    return dataclasses.replace(config.moe, balance_weight=0.0, z_loss_weight=0.0)


def modeling_source(config: ModelConfig) -> str:
    """Return the text of the file, with the source of the layers that a model has.

    Raises UserError for a layer that is not of this package.
    """
    layers = set()
    for spec in block_specs(config):
        package, _, module = spec.mixer.__module__.rpartition(".")
        if package != _LAYERS:
            raise UserError(
                f"{spec.name} is a layer of {spec.mixer.__module__}, expected one of {_LAYERS}: an "
                "exported model carries the source of this package alone"
            )
        layers.add((package, module))
    replaced = _WITHOUT_EXPERTS if config.moe is None else {}
    sources = bundle([*_ENTRIES, *sorted(layers)], replaced=replaced, empty=_UNUSED)
    text = json.dumps(sources, sort_keys=True)
    package = "_hybrid_pretrain_" + hashlib.sha256(text.encode()).hexdigest()[:12]
    parts = []
    for name, source in sorted(sources.items()):
        moved = moved_into(package, source)
        if "'''" in moved:
            raise ValueError(f"{name} has three single quotes, which end it in the file")
        parts.append(f"_SOURCES[{name!r}] = r'''{moved}'''")
    template = (_STANDALONE / "modeling.py").read_text(encoding="utf-8")
    filled = template.replace('"_hybrid_pretrain_package"', repr(package))
    return filled.replace("# SOURCES", "\n\n".join(parts))
