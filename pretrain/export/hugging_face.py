"""Checkpoints as Hugging Face models.

``python -m pretrain export CHECKPOINT FOLDER`` writes safetensors, a config and the tokenizer. A
model of a family of transformers (:mod:`pretrain.export.families`) loads as a stock model of its;
any other comes with a file of its code (:mod:`pretrain.export.standalone_model`) and loads with
``trust_remote_code=True``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes, write_json
from pretrain.common.outputs import check_folder
from pretrain.config import ModelConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.export.families import FAMILIES, Family, to_theirs
from pretrain.export.families.fla import FlaFamily
from pretrain.export.standalone_model import TOKENIZER_CLASS, TOKENIZER_FILE, write_standalone_model
from pretrain.model.language_model import LanguageModel

_SHARD = "5GB"


def family_of(config: ModelConfig) -> tuple[Family | None, str]:
    """Return the family that a model is of, or None and why it is not of each."""
    reasons = []
    for family in FAMILIES:
        if isinstance(family, FlaFamily):
            continue  # its classes run on GPUs alone
        reason = family.reason_against(config)
        if reason is None:
            return family, ""
        reasons.append(f"no {family.model_type}: {reason}")
    return None, "; ".join(reasons)


def export_checkpoint(
    checkpoint: str | Path,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    averaged: bool = False,
) -> str:
    """Write ``folder``; return what loads it. Raises UserError where it cannot be written."""
    from pretrain.inference.load import load_model

    check_folder(folder, "the folder to write")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} already exists and is not empty; choose another folder")
    loaded = load_model(checkpoint, averaged=averaged, dtype=dtype)
    seq_len, eod_id = loaded.run.train.seq_len, loaded.tokenizer.eod_id
    tokens = min(loaded.tokenizer.vocab_size, loaded.model.vocab_size)
    reason = write_hugging_face(loaded.model, folder, seq_len, eod_id, dtype, tokens)
    write_tokenizer(loaded.tokenizer, folder)
    if reason is None:
        return "AutoModelForCausalLM.from_pretrained(FOLDER)"
    return f"AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)  ({reason})"


def write_hugging_face(
    model: LanguageModel,
    folder: Path,
    seq_len: int,
    eod_id: int,
    dtype: torch.dtype,
    tokens: int | None = None,
) -> str | None:
    """Write config.json, the weights and, unless the model is of a known family, the code.

    ``tokens``: ids that the tokenizer has, of the rows of the embedding, beyond which nothing is
    ever generated; None: all. Returns the reasons why it is of no family, or None.
    """
    config, tokens = model.model_config, tokens or model.vocab_size
    family, reason = family_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    # Written last: without it, what an interruption leaves cannot be loaded.
    (folder / "config.json").unlink(missing_ok=True)
    # Parameters of a wider dtype, such as gates, keep it.
    weights = {
        name: p.detach().to(dtype if p.dtype == model.context.dtype else p.dtype)
        for name, p in model.named_parameters()
    }
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eod_id)
    if family is not None:
        for name in ("embedding.weight", "head.weight"):
            if name in weights:
                weights[name] = weights[name][:tokens].clone()
        weights = dict(to_theirs(family, config, weights))
        described = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            **family.config_of(config, tokens, seq_len),
            **ends,
            "dtype": str(dtype).removeprefix("torch."),
        }
    else:
        described = write_standalone_model(folder, model, seq_len, eod_id, dtype, tokens)
        weights = {f"model.{name}": value for name, value in weights.items()}
    _write_weights(weights, folder)
    write_json(folder / "generation_config.json", {"use_cache": True, **ends})
    write_json(folder / "config.json", described)
    return reason or None


def _write_weights(weights: dict[str, Tensor], folder: Path) -> None:
    try:
        from huggingface_hub import save_torch_state_dict
        from safetensors import SafetensorError
    except ImportError:
        raise UserError("export needs huggingface_hub: pip install transformers") from None
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    try:
        save_torch_state_dict(contiguous, folder, max_shard_size=_SHARD, metadata={"format": "pt"})
    except SafetensorError as error:  # of the system: the disk is full
        raise UserError(f"cannot write the weights into {folder}: {error}") from None
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # written readable by its owner alone


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's file, and what AutoTokenizer needs to load it."""
    write_bytes(folder / tokenizer.path.name, tokenizer.path.read_bytes())
    end = tokenizer.name_of(tokenizer.eod_id)
    # Any token can pad: the mask hides it.
    settings: dict[str, Any] = {
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.kind == "huggingface":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        source = Path(__file__).parent / "standalone" / TOKENIZER_FILE
        write_bytes(folder / TOKENIZER_FILE, source.read_bytes())
        module = TOKENIZER_FILE.removesuffix(".py")
        settings["tokenizer_class"] = TOKENIZER_CLASS
        settings["auto_map"] = {"AutoTokenizer": [f"{module}.{TOKENIZER_CLASS}", None]}
    write_json(folder / "tokenizer_config.json", settings)


def export_command(arguments: Sequence[str]) -> int:
    """Run ``python -m pretrain export``; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain export", description="Write a checkpoint as a Hugging Face model."
    )
    parser.add_argument("checkpoint", help="a run directory, or one of its checkpoints/step-N")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--weights", choices=("last", "ema"), default="last")
    given = parser.parse_args(arguments)
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[given.precision]
    how = export_checkpoint(
        given.checkpoint, given.folder, dtype=dtype, averaged=given.weights == "ema"
    )
    files = ", ".join(sorted(p.name for p in given.folder.iterdir()))
    print(f"written to {given.folder}: {files}")
    print(f"load with transformers: {how.replace('FOLDER', repr(str(given.folder)))}")
    return 0
