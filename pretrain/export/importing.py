"""Hugging Face models as runs of one checkpoint.

``python -m pretrain import NAME RUN`` takes models of the families of
:mod:`pretrain.export.families`, and what ``python -m pretrain export`` wrote, whatever its layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.checkpoint.state import CheckpointState
from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes
from pretrain.common.outputs import check_folder
from pretrain.config import ModelConfig, RunConfig, TrainConfig
from pretrain.data.tokenizer import Tokenizer
from pretrain.export.families import FAMILIES, to_ours
from pretrain.export.families.fla import FlaFamily
from pretrain.export.imported_tokenizer import (
    SourceTokenizer,
    generation_settings,
    read_own_tokenizer,
    read_tokenizer,
)
from pretrain.export.standalone_model import MODEL_TYPE
from pretrain.inference.load import IMPORTED
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.run_directory import RunDirectory


@dataclass
class _Source:
    """A model to import: ``fill`` copies its weights into ours of ``rows`` tokens."""

    config: ModelConfig
    rows: int
    seq_len: int
    fill: Callable[[LanguageModel], None]
    tokenizer: SourceTokenizer


def import_model(source: str, run_directory: Path, *, gguf_file: str | None = None) -> Path:
    """Make a run directory of a Hugging Face model, by its name or folder.

    Returns its one checkpoint, of step 0. It can be scored, sampled from and given to
    ``initialize``; it has no optimizer state to resume training with. Its tokenizer is the source's
    file as it is, so that data prepared with one is accepted by the other. Raises UserError for a
    model that is of no known family and not exported by us.
    """
    from pretrain.checkpoint.writer import write_weights
    from pretrain.parallel.processes import start_processes

    check_folder(run_directory, "the run directory")
    if run_directory.exists():
        raise UserError(f"{run_directory} already exists; choose another name")
    found = _open(source, gguf_file)
    start_processes()
    model = build_model(found.config, found.rows, seed=0)
    found.fill(model)
    text = found.tokenizer
    with tempfile.TemporaryDirectory() as temporary:  # a tokenizer that is refused leaves no run
        path = Path(temporary) / text.name
        write_bytes(path, text.content)
        tokenizer = Tokenizer.load(path)
        extra = None
        if text.settings is not None:
            extra = Path(temporary) / IMPORTED
            text.settings.save(extra)
        run_directory.mkdir(parents=True)
        # Where ``tokenizer: {path: RUN}`` of a data config finds it.
        write_bytes(run_directory / text.name, text.content)
        run = RunConfig(
            name=run_directory.name,
            model=found.config,
            train=TrainConfig(steps=1, seq_len=found.seq_len),
            directory=str(run_directory),
        )
        state = CheckpointState(
            step=0,
            tokens=0,
            seed=0,
            skipped=0,
            vocab_size=found.rows,
            precision="float32",
            tokenizer_sha256=tokenizer.sha256,
            data=[],
            model=dataclasses.asdict(found.config),
        )
        checkpoints = RunDirectory(run_directory).checkpoints
        return write_weights(checkpoints, model, run, state, path, extra)


def _open(source: str, gguf_file: str | None) -> _Source:
    try:
        import transformers
    except ImportError:
        raise UserError("import needs transformers: pip install transformers") from None
    # No code that comes with a model is run, nor asked about.
    options: dict[str, Any] = {"trust_remote_code": False}
    if gguf_file:
        options["gguf_file"] = gguf_file
    try:
        described, _ = transformers.PretrainedConfig.get_config_dict(source, **options)
        kind = described.get("model_type")
        if kind == MODEL_TYPE:
            return _open_own(source, described)
        family = next((family for family in FAMILIES if family.model_type == kind), None)
        if family is None:
            known = ", ".join(sorted(family.model_type for family in FAMILIES))
            raise UserError(f"{source}: its model_type is {kind}, expected one of {known}")
        if isinstance(family, FlaFamily):
            return _open_fla(source, family, described)
        # By its name: other packages may have put classes of theirs in the place of AutoModel's.
        architecture: Any = getattr(transformers, family.architecture)
        original: Any = architecture.from_pretrained(source, dtype=torch.float32, **options)
        settings = original.generation_config.to_diff_dict()
        text = read_tokenizer(source, settings, options)
    except UserError:
        raise
    except Exception as error:  # transformers and the formats it reads raise anything
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{source}: could not be loaded by transformers ({said[0]})") from None
    config = build_config(ModelConfig, family.model_of(original.config), "import")
    return _Source(
        config,
        original.config.vocab_size,
        family.longest_text(original.config),
        lambda model: to_ours(family, model, family.renamed_weights(original.state_dict(), config)),
        text,
    )


def _open_fla(source: str, family: FlaFamily, described: dict[str, Any]) -> _Source:
    """Open a model of flash-linear-attention by its files: its classes need a GPU."""
    theirs = family.settings(described)
    config = build_config(ModelConfig, family.model_of(theirs), "import")

    def fill(model: LanguageModel) -> None:
        with ExitStack() as stack:
            to_ours(family, model, family.renamed_weights(_Weights(source, stack), config))

    text = read_tokenizer(source, generation_settings(source), {"trust_remote_code": False})
    return _Source(config, theirs.vocab_size, theirs.max_position_embeddings, fill, text)


def _open_own(source: str, described: dict[str, Any]) -> _Source:
    """Open what ``python -m pretrain export`` wrote, without running the code beside it."""
    try:
        config = build_config(ModelConfig, described["model"], f"{source}/config.json")
        rows, seq_len = int(described["embedding_rows"]), int(described["max_position_embeddings"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{source}/config.json is of no export that this version reads ({error}); export the "
            "run again"
        ) from None
    return _Source(
        config,
        rows,
        seq_len,
        lambda model: _fill_own(model, source),
        read_own_tokenizer(source),
    )


@torch.no_grad()
def _fill_own(model: LanguageModel, source: str) -> None:
    with ExitStack() as stack:
        weights = _Weights(source, stack)
        for name, parameter in model.named_parameters():
            theirs = f"model.{name}"
            found = weights.get(theirs)
            if found is None or found.shape != parameter.shape:
                shape = "missing" if found is None else tuple(found.shape)
                raise UserError(f"{theirs} is {shape}, expected {tuple(parameter.shape)}")
            parameter.copy_(found)


class _Weights(Mapping[str, Tensor]):
    """The tensors of a source's safetensors, each read when it is asked for."""

    def __init__(self, source: str, stack: ExitStack) -> None:
        from safetensors import safe_open
        from transformers.utils.hub import cached_file, get_checkpoint_shard_files

        index = cached_file(
            source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False
        )
        if index is None:
            names = [cached_file(source, "model.safetensors")]
        else:
            names, _ = get_checkpoint_shard_files(source, index)
        self._files: dict[str, Any] = {}
        for name in names:
            opened: Any = stack.enter_context(safe_open(str(name), framework="pt"))
            self._files |= dict.fromkeys(opened.keys(), opened)

    @override
    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._files[name].get_tensor(name)
        return found

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    @override
    def __len__(self) -> int:
        return len(self._files)


def import_command(arguments: Sequence[str]) -> int:
    """Run ``python -m pretrain import``; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain import",
        description="Make a run with one checkpoint of a Hugging Face model: one of "
        + ", ".join(sorted(family.model_type for family in FAMILIES))
        + ", or one that python -m pretrain export wrote.",
    )
    parser.add_argument("source", help="a name, or a folder")
    parser.add_argument("run", type=Path, help="a new run directory, such as runs/NAME")
    parser.add_argument("--gguf-file", help="the file to take from it, where it holds GGUF files")
    given = parser.parse_args(arguments)
    checkpoint = import_model(given.source, given.run, gguf_file=given.gguf_file)
    counted = json.loads((checkpoint / "state.json").read_text())["vocab_size"]
    print(f"written to {checkpoint}, a vocabulary of {counted:,}")
    print(f"python -m evals {given.run} --tasks hellaswag")
    return 0
