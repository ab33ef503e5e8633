"""Models of any layers as one file that transformers loads without this project.

The file carries the source of the layers themselves, as text, and makes modules of it in a separate
package. Layers import megatron-core only where there are several processes, so the file needs none
of it. The exported model computes what the trained one did, and a new layer is exported without an
additional line.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs

MODELING_FILE = "modeling_hybrid.py"
TOKENIZER_FILE, TOKENIZER_CLASS = "tokenization_sentencepiece.py", "SentencePieceText"
_STANDALONE = Path(__file__).parent / "standalone"
_ROOT = Path(__file__).parents[2]
_REPLACED = {"pretrain.nn.moe": _STANDALONE / "moe.py"}
# Imported only where there are several processes.
_UNUSED = {
    "pretrain",
    "pretrain.parallel",
    "pretrain.parallel.megatron",
    "pretrain.parallel.processes",
}


def write_standalone_model(
    folder: Path, model: LanguageModel, seq_len: int, eod_id: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Write the code into ``folder``; return config.json.

    Raises UserError for a mixture of experts, whose dispatch between processes is megatron-core's.
    """
    config = model.model_config
    if config.moe is not None:
        raise UserError("a model with a mixture of experts cannot be exported yet")
    write_bytes(folder / MODELING_FILE, modeling_source().encode())
    module = MODELING_FILE.removesuffix(".py")
    return {
        "architectures": ["HybridForCausalLM"],
        "model_type": "hybrid_pretrain",
        "auto_map": {
            "AutoConfig": f"{module}.HybridConfig",
            "AutoModelForCausalLM": f"{module}.HybridForCausalLM",
        },
        "model": dataclasses.asdict(dataclasses.replace(config, dropout=0.0)),
        "vocab_size": model.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(block_specs(config)),
        "max_position_embeddings": seq_len,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": False,
        "dtype": str(dtype).removeprefix("torch."),
    }


def modeling_source() -> str:
    """Return the text of the file."""
    sources = _sources("pretrain.model.language_model")
    text = json.dumps(sources, sort_keys=True)
    package = "_hybrid_pretrain_" + hashlib.sha256(text.encode()).hexdigest()[:12]
    parts = []
    for name, source in sorted(sources.items()):
        moved = _moved_into(package, source)
        if "'''" in moved:
            raise ValueError(f"{name} has three single quotes, which end it in the file")
        parts.append(f"_SOURCES[{name!r}] = r'''{moved}'''")
    template = (_STANDALONE / "modeling.py").read_text(encoding="utf-8")
    filled = template.replace('"_hybrid_pretrain_package"', repr(package))
    return filled.replace("# SOURCES", "\n\n".join(parts))


def _sources(start: str) -> dict[str, str]:
    """Return the text of a module and of all that it imports of ours, by name."""
    found: dict[str, str] = {}
    pending = [start]
    while pending:
        name = pending.pop()
        if name in found:
            continue
        path = _path(name)
        source = path.read_text(encoding="utf-8") if path is not None else ""
        found[name] = source
        for node in _own_imports(source):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            pending += [str(node.module), *(each for each in names if _path(each) is not None)]
        # A package's __init__ runs before its modules.
        if "." in name:
            pending.append(name.rpartition(".")[0])
    return found


def _own_imports(source: str) -> list[ast.ImportFrom]:
    """Return the imports of modules of ours, those inside functions included."""
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pretrain"
    ]


def _moved_into(package: str, source: str) -> str:
    """Return the source with its imports of ours from inside ``package``."""
    lines = source.splitlines(keepends=True)
    for node in _own_imports(source):
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line.replace("from pretrain", f"from {package}.pretrain", 1)
    return "".join(lines)


def _path(name: str) -> Path | None:
    if name in _REPLACED:
        return _REPLACED[name]
    if name in _UNUSED:
        return None
    path = _ROOT.joinpath(*name.split("."))
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None
