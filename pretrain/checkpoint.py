"""Checkpoints: whole or absent, checked before use, loadable under another layout of processes.

``checkpoints/step-N/`` holds megatron-core's distributed checkpoint (weights, optimizer state),
the resolved ``config.yaml``, ``state.json`` and ``files.json``, the size and sha256 of every file.
It is written under another name, flushed to disk, and renamed; ``latest`` is written after that.
The data position, the schedule and the random numbers are functions of the step, so the step is
their state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import queue
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from data_prep.config_files import build_config
from data_prep.errors import UserError
from data_prep.manifest import sync, write_bytes, write_json
from pretrain.config import ModelConfig, RunConfig, to_yaml
from pretrain.models.blocks import block_specs
from pretrain.parallel.engine import Engine
from pretrain.parallel.megatron_on_cpu import device_scope
from pretrain.parallel.processes import is_main_process, on_main_process

# What fails there is raised as well, and told in one sentence below.
logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)
_OPTIMIZER_LAYOUT = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass
class CheckpointState:
    """What a checkpoint says of itself. step: optimizer steps done; skipped: steps that were left
    out for a loss or gradient that was not finite."""

    step: int
    tokens: int
    seed: int
    skipped: int
    vocab_size: int
    precision: str
    tokenizer_sha256: str
    data: list[str]
    model: dict[str, Any]

    @property
    def model_config(self) -> ModelConfig:
        return build_config(ModelConfig, self.model, "checkpoint")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a run, newest first."""
    named = (p for p in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))
    return sorted((p for p in named if p.is_dir()), reverse=True)


def save_checkpoint(
    directory: Path,
    engine: Engine,
    config: RunConfig,
    state: CheckpointState,
    tokenizer: Path | None = None,
) -> Path:
    """Write ``directory/step-N`` from all processes, then remove what keep_last lets go.

    The ``tokenizer``'s file is copied along, so that a checkpoint can be used wherever it lies.
    """
    final = directory / checkpoint_name(state.step)
    name = [f".writing-{final.name}-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(name)
    writing = directory / name[0]

    def begin() -> None:
        for left_over in directory.glob(".writing-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        try:
            writing.mkdir(parents=True)
        except OSError as error:
            raise _not_written(final, error) from None

    on_main_process(begin)
    try:
        _write(writing, engine, config, state, tokenizer)
    except (CheckpointException, OSError) as error:
        refusal = _not_written(final, error)
        shutil.rmtree(writing, ignore_errors=True)
        raise refusal from None
    if is_main_process():
        _replace_folder(writing, final)
        write_bytes(directory / "latest", final.name.encode())
        _remove_old(final, config)
    dist.barrier()
    return final


def _write(
    writing: Path,
    engine: Engine,
    config: RunConfig,
    state: CheckpointState,
    tokenizer: Path | None,
) -> None:
    # The writers' results come back to this process: no need for the queue server that
    # megatron-core would start, which imports the whole program once more.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
    with device_scope():
        dist_checkpointing.save(_sharded_state(engine.model, engine), str(writing))
    dist.barrier()
    if is_main_process():
        write_json(writing / "state.json", dataclasses.asdict(state))
        write_bytes(writing / "config.yaml", to_yaml(config).encode())
        if tokenizer is not None:
            write_bytes(writing / tokenizer.name, tokenizer.read_bytes())
    dist.barrier()
    hashes = _hash_own_share(writing)
    if is_main_process():
        write_json(writing / "files.json", hashes)
        sync(writing)


def _not_written(final: Path, error: BaseException) -> UserError:
    earlier = list_checkpoints(final.parent)
    place = next(p for p in final.parents if p.is_dir())
    free = shutil.disk_usage(place).free / 1e6
    reason = error.strerror if isinstance(error, OSError) else str(error).strip().splitlines()[-1]
    return UserError(
        f"cannot write checkpoint {final}: {reason} ({free:,.0f} MB free there); "
        + (f"the last whole one is {earlier[0].name}" if earlier else "there is no earlier one")
    )


def _hash_own_share(folder: Path) -> dict[str, dict[str, Any]]:
    """Flush and hash every file of ``folder``, shared out over the processes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    own = {}
    for path in files[dist.get_rank() :: dist.get_world_size()]:
        sync(path)
        own[str(path.relative_to(folder))] = {
            "size": path.stat().st_size,
            "sha256": _sha256(path),
        }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {name: entry for part in everyone for name, entry in sorted(part.items())}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace_folder(writing: Path, final: Path) -> None:
    if final.exists():  # saved again after a resume from an earlier step
        old = final.with_name(f".writing-old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        writing.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        writing.rename(final)
    sync(final.parent)


def recover_replaced(directory: Path) -> None:
    """Bring back a checkpoint whose replacement was cut off between the two renames."""
    for old in directory.glob(".writing-old-step-*"):
        final = old.with_name(old.name.removeprefix(".writing-old-"))
        if not final.exists():
            old.rename(final)


def _remove_old(newest: Path, config: RunConfig) -> None:
    """Later steps than ``newest``, left from before a resume from an earlier one, do not count."""
    milestone = config.checkpoint.milestone_every
    done = [p for p in list_checkpoints(newest.parent) if p.name <= newest.name]
    for path in done[config.checkpoint.keep_last :]:
        step = int(path.name.removeprefix("step-"))
        if not (milestone and step % milestone == 0):
            hidden = path.with_name(f".writing-removed-{path.name}")
            path.rename(hidden)  # first out of sight, so that no half-removed one is ever seen
            shutil.rmtree(hidden, ignore_errors=True)


def check_files(checkpoint: Path, how: str = "sha256") -> None:
    """Raise UserError naming the first file that is missing, cut short or altered."""
    try:
        listed = json.loads((checkpoint / "files.json").read_bytes())
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        raise _damaged(checkpoint, "files.json is missing or unreadable") from None
    if not {".metadata", "common.pt", "state.json", "config.yaml"} <= expected.keys():
        raise _damaged(checkpoint, "files.json does not list what a checkpoint is made of")
    for name, (size, sha256) in expected.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise _damaged(checkpoint, f"{name} is missing")
        if found != size:
            raise _damaged(checkpoint, f"{name} has {found} bytes, expected {size}")
        if how == "sha256" and _sha256(path) != sha256:
            raise _damaged(checkpoint, f"{name} has changed since it was written (sha256)")


def _damaged(checkpoint: Path, what: str) -> UserError:
    earlier = [p for p in list_checkpoints(checkpoint.parent) if p.name < checkpoint.name]
    offer = (
        f"the one before it is {earlier[0].name}: resume from it with "
        f"checkpoint.resume={earlier[0].name}"
        if earlier
        else "there is none before it"
    )
    return UserError(f"checkpoint {checkpoint} is damaged: {what}; {offer}")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the latest of a run's directory."""
    if (path / "files.json").is_file() or path.name.startswith("step-"):
        if not path.is_dir():
            raise UserError(f"no checkpoint at {path}")
        return path
    for directory in (path / "checkpoints", path):
        latest = directory / "latest"
        if latest.is_file() and (directory / latest.read_text().strip()).is_dir():
            return directory / latest.read_text().strip()
        found = list_checkpoints(directory) if directory.is_dir() else []
        if found:
            return found[0]
    raise UserError(
        f"no checkpoint at {path}: expected a run directory or one of its checkpoints/step-N"
    )


def read_state(checkpoint: Path) -> CheckpointState:
    """What the checkpoint says of itself, without loading it."""
    try:
        values = json.loads((checkpoint / "state.json").read_bytes())
        return build_config(CheckpointState, values, str(checkpoint / "state.json"))
    except (OSError, ValueError):
        raise _damaged(checkpoint, "state.json is missing or unreadable") from None


def check_same_model(
    state: CheckpointState, model: ModelConfig, vocab_size: int, checkpoint: Path
) -> None:
    """Raise UserError naming each setting in which the checkpoint's model is another one."""
    # Defaults spelled out and defaults left out are the same model.
    saved, wanted = (_model_settings(m) for m in (state.model_config, model))
    saved["vocab_size"], wanted["vocab_size"] = state.vocab_size, vocab_size
    differences = [
        f"model.{key} is {saved.get(key)} there and {wanted.get(key)} here"
        for key in sorted({*saved, *wanted})
        if saved.get(key) != wanted.get(key) and not key.startswith(("init_std", "depth_scaled"))
    ]
    if differences:
        raise UserError(f"{checkpoint} holds another model: {'; '.join(differences)}")


def _model_settings(model: ModelConfig) -> dict[str, Any]:
    """Every setting of a model by its dotted name, those of the mixers it uses filled in."""
    settings = dataclasses.asdict(model)
    specs = {spec.name: spec for spec in block_specs(model)}
    settings["mixers"] = {name: spec.identity for name, spec in specs.items()}
    return _flat(settings)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def load_checkpoint(checkpoint: Path, engine: Engine) -> None:
    """Weights and optimizer state into an engine whose model has the checkpoint's shape."""
    with device_scope():
        wanted = _sharded_state(engine.model, engine, is_loading=True)
        loaded = dist_checkpointing.load(wanted, str(checkpoint))
        _copy_weights(engine.model, loaded["model"])
        engine.optimizer.load_state_dict(loaded["optimizer"])


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Weights alone, for evaluation."""
    with device_scope():
        loaded = dist_checkpointing.load({"model": _sharded_weights(model)}, str(checkpoint))
        _copy_weights(model, loaded["model"])


@torch.no_grad()
def _copy_weights(model: nn.Module, loaded: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if loaded[name] is not parameter:
            parameter.copy_(loaded[name])


def _sharded_state(model: nn.Module, engine: Engine, is_loading: bool = False) -> dict[str, Any]:
    weights = _sharded_weights(model)
    optimizer = engine.optimizer.sharded_state_dict(
        weights, is_loading=is_loading, metadata=_OPTIMIZER_LAYOUT
    )
    return {"model": weights, "optimizer": optimizer}


def _sharded_weights(model: nn.Module) -> dict[str, Any]:
    """Each parameter as megatron-core's checkpoints want it: its name, and where this part lies."""
    weights: dict[str, Any] = {}
    parameter: Any
    for name, parameter in model.named_parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            weights[name] = make_tp_sharded_tensor_for_checkpoint(
                parameter, name, tp_axis=parameter.partition_dim
            )
        else:
            weights[name] = make_sharded_tensor_for_checkpoint(parameter, name)
    return weights
