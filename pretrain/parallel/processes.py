"""Process groups and devices: NCCL where CUDA is present, gloo elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.common.metrics import merge_metrics
from pretrain.config.checks import check_world_size
from pretrain.config.parallel import ParallelConfig
from pretrain.ops.chain import close_chains, open_chain
from pretrain.parallel.cpu import importing_megatron
from pretrain.parallel.gpu_environment import prepare_gpu
from pretrain.parallel.launcher_watch import processes_met, watch_launcher

T = TypeVar("T")

_named_here: list[str] = []  # environment variables that no launcher set
_left: list[ParallelConfig] = []  # layouts whose groups ended; garbage may hold them
_host_groups: list[dist.ProcessGroup] = []  # of all processes, where those of NCCL need the GPU


def local_device() -> torch.device:
    """Return this process's device, a GPU with its environment prepared."""
    if torch.cuda.is_available():
        prepare_gpu()
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def world_size() -> int:
    """Return the number of processes, known before they have met."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def groups() -> Any:
    """Return megatron-core's parallel_state where its groups exist, else None."""
    state = sys.modules.get("megatron.core.parallel_state")
    return state if state is not None and state.model_parallel_is_initialized() else None


def start_processes(config: ParallelConfig | None = None) -> bool:
    """Join the process group that torchrun set up, or make a group of one; then megatron-core's.

    Does nothing where megatron-core's groups exist already. Returns whether anything was started,
    for whoever must stop it. Raises UserError where the processes do not divide into copies of
    the model.
    """
    config = config or ParallelConfig()
    if groups() is not None:
        return False
    check_world_size(config, world_size())
    watch_launcher()
    with importing_megatron():
        from megatron.core import parallel_state
    fresh = not dist.is_initialized()
    # Longer than the watchdog's, which can report more than "timed out".
    timeout = datetime.timedelta(minutes=2 * config.timeout_minutes)
    if fresh:
        order_kernels(config)
        _connect(local_device(), timeout)
    # NCCL has its device by now. From a world with a device torch splits off every new group, for
    # which all processes must be there: those outside of a group of gloo would wait for ever.
    world: Any = dist.group.WORLD
    world.bound_device_id = None
    if fresh and dist.get_backend() == "nccl" and dist.get_world_size() > 1:
        _host_groups.append(dist.new_group(timeout=timeout, backend="gloo"))
    parts = config.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        context_parallel_size=config.context,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=parts if parts > 1 else None,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=2 * config.timeout_minutes,
    )
    if config.context > 1:
        group = parallel_state.get_context_parallel_group()
        open_chain(group, timeout, ring=config.ring_scans)
    processes_met()
    return True


def _connect(device: torch.device, timeout: datetime.timedelta) -> None:
    """Make the group of all processes: those of torchrun, or this one."""
    options: dict[str, Any] = {"backend": "gloo", "timeout": timeout}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options |= {"backend": "nccl", "device_id": device}
    if "RANK" not in os.environ:
        # Threads of NCCL's use the store too: they get the kind that torchrun would give them.
        local = device.type == "cpu"
        store = dist.HashStore() if local else dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        options |= {"store": store, "rank": 0, "world_size": 1}
    dist.init_process_group(**options)


@contextlib.contextmanager
def process_groups(config: ParallelConfig) -> Iterator[None]:
    """Join the process groups that do not exist yet, and leave those, and no others, at the end.

    After an exception on one of several processes they are not left: that would wait for peers
    which may never come.
    """
    _let_go_of_groups()
    had_groups, hook = dist.is_initialized(), sys.excepthook
    linear = torch.nn.functional.linear
    failed, started = True, False
    try:
        started = start_processes(config)
        yield
        failed = False
    finally:
        torch.nn.functional.linear = linear  # which DeepSpeed's ZeRO-3 replaces for good
        if not failed or world_size() == 1:
            _left.append(config)
            state = groups()
            if not had_groups:
                stop_processes()
                if getattr(sys.excepthook, "__name__", "") == "_distributed_excepthook":
                    sys.excepthook = hook  # torch's names the rank before every line
            elif started and state is not None:
                close_chains()
                state.destroy_model_parallel()


def _let_go_of_groups() -> None:
    """Collect what holds the groups of runs that have ended: objects in cycles, found late.

    A run's groups have some 80 sockets and files, and a process has 1,024 at most.
    """
    if _left:
        _left.clear()
        gc.collect()


def order_kernels(config: ParallelConfig) -> None:
    """Make GPUs run kernels in launch order where tensors are sharded.

    The all-reduce of a gradient then comes before the products that it overlaps with, which would
    otherwise take the full GPU. Call before CUDA starts; a variable that is already set is kept.
    """
    if config.tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def name_local_rank() -> None:
    """Set ``LOCAL_RANK`` until :func:`stop_processes`, if it is not set.

    DeepSpeed asks for it also where no launcher was needed. Other libraries take it for a
    launcher's, and wait for its processes.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"
        _named_here.append("LOCAL_RANK")


def stop_processes() -> None:
    """Destroy all process groups."""
    while _named_here:
        os.environ.pop(_named_here.pop(), None)
    state = groups()
    if state is not None:
        state.destroy_model_parallel()
    close_chains()
    _host_groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main_process() -> bool:
    """Return whether this process is the one that prints and writes the small files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def rank() -> int:
    """Return this process's number among all; 0 where no process group exists."""
    return dist.get_rank() if dist.is_initialized() else 0


def data_parallel_rank_and_size() -> tuple[int, int]:
    """Return (rank, size) of this process among the data-parallel ones; (0, 1) without groups.

    Context-parallel ranks are one of them together: they read the same micro-batches.
    """
    state = groups()
    if state is None:
        return 0, 1
    return state.get_data_parallel_rank(), state.get_data_parallel_world_size()


def replica_rank_and_size() -> tuple[int, int]:
    """Return (rank, size) of this process among those with the same weights; (0, 1) without groups.

    These are the data-parallel ones and, of each, the context-parallel ones.
    """
    state = groups()
    if state is None:
        return 0, 1
    return (
        state.get_data_parallel_rank(with_context_parallel=True),
        state.get_data_parallel_world_size(with_context_parallel=True),
    )


def context_group() -> dist.ProcessGroup | None:
    """Return the context-parallel ranks, None where each process has whole rows."""
    state = groups()
    if state is None or state.get_context_parallel_world_size() == 1:
        return None
    group: dist.ProcessGroup = state.get_context_parallel_group()
    return group


def tensor_parallel_rank() -> int:
    """Return this process's number among the tensor-parallel ones; 0 without groups."""
    state = groups()
    return 0 if state is None else state.get_tensor_model_parallel_rank()


def on_main_process(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Return ``function``'s result from the main process on every one, or raise what it raised."""
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_every_process(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Return ``function``'s results by rank; what it raises on one process, all of them raise."""
    outcome: tuple[T, None] | tuple[None, Exception]
    try:
        outcome = (function(), None)
    except Exception as error:
        outcome = (None, error)
    everyone = gather(outcome, group)
    results: list[Any] = []
    for result, failure in everyone:
        if failure is not None:
            raise failure
        results.append(result)
    return results


def all_reduce_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Merge the metrics of all processes, whatever names each has; see :func:`merge_metrics`.

    Every process must call.
    """
    merged: dict[str, float] = {}
    for found in gather(metrics):
        merge_metrics(merged, found)
    return merged


def first_of_pipeline(found: dict[str, float]) -> dict[str, float]:
    """Return the metrics of the first pipeline stage that has any; every process must call."""
    state = groups()
    group = None if state is None else state.get_pipeline_model_parallel_group()
    return next((each for each in gather(found, group) if each), {})


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return every process's value, by rank; every process of ``group`` must call."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group)
    return everyone


def sum_over_replicas(values: Tensor) -> None:
    """Add up, in place, over processes with the same weights and the stages of a pipeline."""
    state = groups()
    if state is not None:
        dist.all_reduce(values, group=state.get_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(values, group=state.get_pipeline_model_parallel_group())


def any_process(flag: bool) -> bool:
    """Return whether ``flag`` is set on any process; every process must call. Waits for no GPU."""
    if world_size() == 1:
        return flag
    group = _host_groups[0] if _host_groups else None
    value = torch.tensor([float(flag)], device="cpu" if group else local_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
    return bool(value.item())
