"""A teacher's likeliest ids on disk: written once, for any number of students that read as it did.

``cache.json`` says whose they are, and of which data in which order. Each step has a file of its
own, complete or absent, with the tokens' ids, log-probabilities and the log of what is left, and a
checksum of every sequence of tokens.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pretrain.common.errors import UserError
from pretrain.common.files import file_sha256, write_bytes, write_json
from pretrain.config import RunConfig
from pretrain.config.plan import RunPlan
from pretrain.data.batch import Batch
from pretrain.data.batches import PreparedData
from pretrain.data.teacher_top import TeacherTop
from pretrain.parallel.processes import on_main_process
from pretrain.run_directory import FILES_FILE, find_checkpoint
from pretrain.training.phases import difference

CACHE_FILE = "cache.json"
# Of the settings that a cache depends on, where they are no run's own.
_SECTIONS = {
    **dict.fromkeys(("teacher", "top_k", "temperature"), "distill."),
    "precision": "train.",
}
_SMALL_IDS = 2**15  # vocabularies whose ids take two bytes


def identity_of(config: RunConfig, tokenizer_sha256: str, order: Sequence[Any]) -> dict[str, Any]:
    """Return what a cache for a run depends on; ``order`` is :func:`.history_of` it."""
    distill = config.distill
    assert distill is not None
    return {
        "teacher": distill.teacher,
        "tokenizer_sha256": tokenizer_sha256,
        "seed": config.seed,
        "top_k": distill.top_k,
        "temperature": distill.temperature,
        "precision": config.train.precision,
        "order": list(order),
    }


def teacher_hash(checkpoint: Path) -> str:
    """Return a hash of a checkpoint: of the hashes of all its files."""
    return file_sha256(checkpoint / FILES_FILE)


def step_file(folder: Path, step: int) -> Path:
    """Return the file of a step."""
    return folder / f"step-{step:08d}.safetensors"


def checksums(tokens: Tensor, seq_len: int) -> list[int]:
    """Return a checksum of each sequence of ``seq_len`` of a micro-batch's tokens ``[1, T]``."""
    rows = tokens.cpu().view(-1, seq_len).numpy()
    return [zlib.crc32(row.tobytes()) for row in rows]


def write_step(
    folder: Path, step: int, parts: Sequence[TeacherTop], sums: Sequence[int], vocabulary: int
) -> None:
    """Write what the teacher said of the tokens of a step's micro-batches, in their order."""
    ids = torch.cat([part.ids for part in parts])
    values = {
        "ids": ids.to(torch.int16 if vocabulary <= _SMALL_IDS else torch.int32),
        "log_probs": torch.cat([part.log_probs for part in parts]),
        "log_rest": torch.cat([part.log_rest for part in parts]),
        "checksums": torch.tensor(sums, dtype=torch.int64),
    }
    write_bytes(step_file(folder, step), save({n: x.contiguous() for n, x in values.items()}))


class TeacherCache:
    """The cache that a run reads from. Raises UserError where it is of something else."""

    def __init__(self, folder: Path, identity: dict[str, Any], plan: RunPlan):
        self.folder, self._plan = folder, plan
        found = read_cache(folder)
        check_cache(folder, found, identity, plan.num_steps)
        teacher = identity["teacher"]
        if Path(teacher).exists():  # else it is elsewhere, as its cache is for
            now = teacher_hash(find_checkpoint(Path(teacher)))
            if now != found.get("teacher_sha256"):
                raise UserError(
                    f"distill.cache {folder} is of another checkpoint "
                    f"({str(found.get('teacher_sha256'))[:12]}...) than distill.teacher {teacher} "
                    f"now has ({now[:12]}...); expected the one that it was written with, or a new "
                    "folder"
                )
        missing = missing_steps(folder, plan.num_steps)
        if missing:
            raise UserError(
                f"distill.cache {folder} has no step {missing[0] + 1} of the run's "
                f"{plan.num_steps}; "
                "write the rest with python -m pretrain cache-teacher"
            )

    def add(self, batches: Sequence[Batch], step: int, rank: int, size: int) -> None:
        """Put beside the micro-batches of a step what the teacher said of their tokens.

        They are those of data-parallel process ``rank`` of ``size``. Raises UserError where the
        cache has other tokens.
        """
        seq_len = self._plan.phase_at(step).config.train.seq_len
        path = step_file(self.folder, step)
        try:
            with safe_open(path, "pt") as file:
                for number, batch in enumerate(batches):
                    count = batch.tokens.shape[1]
                    first = (number * size + rank) * count
                    wanted = slice(first, first + count)
                    rows = slice(first // seq_len, (first + count) // seq_len)
                    sums = file.get_slice("checksums")[rows].tolist()
                    if sums != checksums(batch.tokens, seq_len):
                        raise UserError(
                            f"{path} is of other tokens than step {step + 1} of this run reads; "
                            "expected the data, seed and order that the cache was written with"
                        )
                    names = ("ids", "log_probs", "log_rest")
                    parts = [file.get_slice(name)[wanted][None] for name in names]
                    batch.top = TeacherTop(*parts)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}; write it again") from None


def open_cache(
    config: RunConfig, plan: RunPlan, data: PreparedData, order: Sequence[Any]
) -> TeacherCache | None:
    """Return the cache that a run learns from, None without one; every process must call.

    ``order`` is what :func:`.history_of` the run says. Raises UserError for that of something else.
    """
    if config.distill is None or config.distill.cache is None:
        return None
    identity = identity_of(config, data.tokenizer.sha256, order)
    folder = Path(config.distill.cache)
    return on_main_process(lambda: TeacherCache(folder, identity, plan))


def read_cache(folder: Path) -> dict[str, Any]:
    """Return what a cache's ``cache.json`` says. Raises UserError where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / CACHE_FILE).read_bytes())
    except (OSError, ValueError):
        raise UserError(
            f"distill.cache is {folder}, where no {CACHE_FILE} can be read; write it with python "
            "-m pretrain cache-teacher"
        ) from None
    return found


def check_cache(
    folder: Path, found: dict[str, Any], identity: dict[str, Any], num_steps: int
) -> None:
    """Raise UserError naming the first setting in which a cache is that of another run."""
    for name, wanted in identity.items():
        was, now = found.get(name), wanted
        if name == "order":
            apart = difference(found.get(name, []), wanted, num_steps)
            name, was, now = apart or (name, None, None)
        if was != now:
            section = _SECTIONS.get(name, "")
            raise UserError(
                f"distill.cache {folder} was written with {section}{name} {was}, the config says "
                f"{now}; expected the same, or another folder"
            )


def begin_cache(folder: Path, identity: dict[str, Any], teacher_sha256: str, steps: int) -> None:
    """Write ``cache.json``, or check the one that is there and goes on."""
    values = {**identity, "teacher_sha256": teacher_sha256}
    if (folder / CACHE_FILE).exists():
        found = read_cache(folder)
        check_cache(folder, found, values, steps)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CACHE_FILE, values)


def missing_steps(folder: Path, steps: int) -> list[int]:
    """Return the steps of a run that a cache does not have."""
    return [step for step in range(steps) if not step_file(folder, step).exists()]
