"""Process groups and devices: NCCL where CUDA is present, gloo elsewhere."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_prep.errors import UserError

T = TypeVar("T")


def local_device() -> torch.device:
    """This process's device."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start_processes(timeout_minutes: float = 30, *, tensor: int = 1) -> None:
    """Join the process group that torchrun set up, or make a group of one; then megatron-core's,
    ``tensor`` processes to a tensor-parallel group.

    Does nothing where megatron-core's groups exist already. Raises UserError where the processes
    do not divide into such groups.
    """
    if not dist.is_initialized():
        device = local_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    if not parallel_state.model_parallel_is_initialized():
        count = dist.get_world_size()
        if count % tensor:
            raise UserError(
                f"parallel.tensor is {tensor}, but there are {count} processes; expected a "
                f"multiple of it, as of torchrun --nproc-per-node {tensor}"
            )
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)


def stop_processes() -> None:
    """Leave all process groups."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes the small files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def data_parallel_place() -> tuple[int, int]:
    """(rank, size) of this process among the data-parallel ones."""
    return (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )


def on_main_process(function: Callable[[], T]) -> T:
    """``function``'s result from the main process, on every process; so is what it raises."""
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def over_processes(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of all processes: the largest where a name ends in ``_max``, else the sum. Every
    process must call with the same names; none is called for where there are none."""
    if not metrics or dist.get_world_size() == 1:
        return metrics
    names = sorted(metrics)
    values = torch.tensor([metrics[n] for n in names], dtype=torch.float64, device=local_device())
    largest = values.clone()
    dist.all_reduce(values, op=dist.ReduceOp.SUM)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    pairs = zip(names, values.tolist(), largest.tolist(), strict=True)
    return {name: top if name.endswith("_max") else total for name, total, top in pairs}


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is set on any process; every process must call."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor([float(flag)], device=local_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
