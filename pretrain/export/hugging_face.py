"""Checkpoints as Hugging Face models, and Llama models as checkpoints.

``python -m pretrain export CHECKPOINT FOLDER`` writes safetensors, a config and the tokenizer. A
model of Llama's shape loads in stock transformers; any other comes with a file of its code
(:mod:`pretrain.export.standalone_model`) and loads with ``trust_remote_code=True``.
``python -m pretrain import NAME RUN`` makes a run with one checkpoint of a Llama model's weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.state import CheckpointState
from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes, write_json
from pretrain.common.outputs import check_folder
from pretrain.config import ModelConfig, RunConfig, TrainConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.export.standalone_model import TOKENIZER_CLASS, TOKENIZER_FILE, write_standalone_model
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs
from pretrain.nn.mixers import registry
from pretrain.run_directory import RunDirectory

_BLOCK = {
    "mixer_norm.weight": "input_layernorm.weight",
    "mixer.q_proj.weight": "self_attn.q_proj.weight",
    "mixer.k_proj.weight": "self_attn.k_proj.weight",
    "mixer.v_proj.weight": "self_attn.v_proj.weight",
    "mixer.o_proj.weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
_SHARD = "5GB"


def llama_names(num_blocks: int, tied: bool) -> dict[str, str]:
    """Map our parameter names to those of transformers' LlamaForCausalLM."""
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
    }
    if not tied:
        names["head.weight"] = "lm_head.weight"
    for index in range(num_blocks):
        for ours, theirs in _BLOCK.items():
            names[f"blocks.{index}.{ours}"] = f"model.layers.{index}.{theirs}"
    return names


def not_llama(config: ModelConfig) -> str | None:
    """Return the reason why a model is not of Llama's shape, or None if it is."""
    specs = block_specs(config)
    for spec in specs:
        if spec.mixer is not registry()["attn"]:
            return f"a block is {spec.name}"
        if spec.moe is not None:
            return "it has a mixture of experts"
    settings = specs[0].config
    if any(spec.config != settings for spec in specs):
        return "its attention layers differ"
    for what, is_there in (
        ("attention has a window", settings.window is not None),
        ("attention has no rotary positions", settings.rope_theta is None),
        ("attention normalises queries and keys", settings.qk_norm),
        (f"the MLP is {config.mlp.kind}", config.mlp.kind != "swiglu"),
        (f"block_norm is {config.block_norm}", config.block_norm != "pre"),
        ("it is recursive", config.recursion is not None),
        ("logits are capped", config.logit_softcap is not None),
        ("embeddings are scaled", config.scale_embeddings),
        ("logits are scaled by the width", config.mup_base_hidden_size is not None),
    ):
        if is_there:
            return what
    return None


def llama_config(config: ModelConfig, vocab_size: int, seq_len: int, eod_id: int) -> dict[str, Any]:
    """Return transformers' config.json of a model of Llama's shape."""
    specs = block_specs(config)
    settings = specs[0].config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp.width(config.hidden_size),
        "num_hidden_layers": len(specs),
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads,
        "head_dim": settings.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": settings.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        # Documents begin and end with the same token.
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "initializer_range": config.init_std,
    }


def model_of_llama(config: Any) -> tuple[ModelConfig, int, int]:
    """Return (model, rows of the vocabulary, longest text) of transformers' LlamaConfig.

    Raises UserError for what our attention does not do.
    """
    if config.model_type != "llama":
        raise UserError(f"the model's model_type is {config.model_type}, expected llama")
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", getattr(config, "rope_theta", 10_000.0))
    for what, found, expected in (
        ("hidden_act", config.hidden_act, "silu"),
        ("attention_bias", config.attention_bias, False),
        ("mlp_bias", config.mlp_bias, False),
        ("rope_type", rope.get("rope_type", "default"), "default"),
    ):
        if found != expected:
            raise UserError(f"the model's {what} is {found}, expected {expected}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "pattern": f"{config.num_hidden_layers}*attn",
        "hidden_size": config.hidden_size,
        "mixers": {
            "attn": {
                "num_heads": config.num_attention_heads,
                "num_kv_heads": config.num_key_value_heads,
                "head_dim": head_dim,
                "rope_theta": float(theta),
            }
        },
        "mlp": {"kind": "swiglu", "intermediate_size": config.intermediate_size},
        "vocab_size": config.vocab_size,
        "tie_embeddings": bool(config.tie_word_embeddings),
        "norm_eps": config.rms_norm_eps,
    }
    return (
        build_config(ModelConfig, values, "import"),
        config.vocab_size,
        (config.max_position_embeddings),
    )


@torch.no_grad()
def fill_from_llama(model: LanguageModel, weights: Mapping[str, Tensor]) -> None:
    """Copy transformers' weights, by their names, into a model of ours.

    Raises UserError naming a weight that is missing or of another shape.
    """
    names = llama_names(len(model.blocks), model.model_config.tie_embeddings)
    for ours, parameter in model.named_parameters():
        found = weights.get(names[ours])
        if found is None or found.shape != parameter.shape:
            shape = "missing" if found is None else tuple(found.shape)
            raise UserError(f"{names[ours]} is {shape}, expected {tuple(parameter.shape)}")
        parameter.copy_(found)


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
    reason = write_hugging_face(loaded.model, folder, seq_len, eod_id, dtype)
    write_tokenizer(loaded.tokenizer, folder)
    if reason is None:
        return "AutoModelForCausalLM.from_pretrained(FOLDER)"
    return f"AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)  ({reason})"


def write_hugging_face(
    model: LanguageModel, folder: Path, seq_len: int, eod_id: int, dtype: torch.dtype
) -> str | None:
    """Write config.json, the weights and, unless the model is of Llama's shape, the code.

    Returns the reason why it is not of that shape, or None.
    """
    config = model.model_config
    reason = not_llama(config)
    folder.mkdir(parents=True, exist_ok=True)
    # Parameters of a wider dtype, such as gates, keep it.
    weights = {
        name: p.detach().to(dtype if p.dtype == model.context.dtype else p.dtype)
        for name, p in model.named_parameters()
    }
    if reason is None:
        names = llama_names(len(model.blocks), config.tie_embeddings)
        weights = {names[name]: value for name, value in weights.items()}
        described = llama_config(config, model.vocab_size, seq_len, eod_id)
        described["dtype"] = str(dtype).removeprefix("torch.")
    else:
        described = write_standalone_model(folder, model, seq_len, eod_id, dtype)
        weights = {f"model.{name}": value for name, value in weights.items()}
    _write_weights(weights, folder)
    write_json(folder / "config.json", described)
    return reason


def _write_weights(weights: dict[str, Tensor], folder: Path) -> None:
    try:
        from huggingface_hub import save_torch_state_dict
    except ImportError:
        raise UserError("export needs huggingface_hub: pip install transformers") from None
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    save_torch_state_dict(contiguous, folder, max_shard_size=_SHARD, metadata={"format": "pt"})
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


def import_llama(source: str, run_directory: Path, *, gguf_file: str | None = None) -> Path:
    """Make a run directory of a Hugging Face model of Llama's shape, by its name or folder.

    Returns its one checkpoint, of step 0. It can be scored, sampled from and given to
    ``initialize``; it has no optimizer state to resume training with.
    """
    from pretrain.checkpoint.writer import write_weights
    from pretrain.parallel.processes import start_processes

    try:
        import transformers
    except ImportError:
        raise UserError("import needs transformers: pip install transformers") from None
    check_folder(run_directory, "the run directory")
    if run_directory.exists():
        raise UserError(f"{run_directory} already exists; choose another name")
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        original: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, **options
        )
        text: Any = transformers.AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # transformers and the formats it reads raise anything
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{source}: could not be loaded by transformers ({said[0]})") from None
    backend: Any = getattr(text, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{source}: its tokenizer has no tokenizer.json, which is what runs use")
    config, vocab_size, seq_len = model_of_llama(original.config)
    start_processes()
    model = build_model(config, vocab_size, seed=0)
    fill_from_llama(model, original.state_dict())
    written = backend.to_str().encode()
    with tempfile.TemporaryDirectory() as folder:  # a tokenizer that is refused leaves no run
        write_bytes(Path(folder) / "tokenizer.json", written)
        Tokenizer.load(Path(folder) / "tokenizer.json")
    run_directory.mkdir(parents=True)
    tokenizer_file = run_directory / "tokenizer.json"
    write_bytes(tokenizer_file, written)
    tokenizer = Tokenizer.load(tokenizer_file)
    run = RunConfig(
        name=run_directory.name,
        model=config,
        train=TrainConfig(steps=1, seq_len=seq_len),
        directory=str(run_directory),
    )
    state = CheckpointState(
        step=0,
        tokens=0,
        seed=0,
        skipped=0,
        vocab_size=vocab_size,
        precision="float32",
        tokenizer_sha256=tokenizer.sha256,
        data=[],
        model=dataclasses.asdict(config),
    )
    return write_weights(RunDirectory(run_directory).checkpoints, model, run, state, tokenizer_file)


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


def import_command(arguments: Sequence[str]) -> int:
    """Run ``python -m pretrain import``; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain import",
        description="Make a run with one checkpoint of a Hugging Face model of Llama's shape.",
    )
    parser.add_argument("source", help="a name, or a folder")
    parser.add_argument("run", type=Path, help="a new run directory, such as runs/NAME")
    parser.add_argument("--gguf-file", help="the file to take from it, where it holds GGUF files")
    given = parser.parse_args(arguments)
    checkpoint = import_llama(given.source, given.run, gguf_file=given.gguf_file)
    counted = json.loads((checkpoint / "state.json").read_text())["vocab_size"]
    print(f"written to {checkpoint}, a vocabulary of {counted:,}")
    print(f"python -m evals {given.run} --tasks hellaswag --bos none")
    return 0
