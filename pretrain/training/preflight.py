"""Say what is likely to go wrong with a run before it starts: memory, and repeated data."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from pretrain.common.dtypes import DTYPES
from pretrain.common.errors import UserError
from pretrain.config import ParallelConfig, RunConfig, check_run_config
from pretrain.config.checks import check_vocab_size
from pretrain.data.batches import TrainingBatches
from pretrain.model.layout import check_layout
from pretrain.parallel.context import CellsOverSegments
from pretrain.parallel.processes import on_every_process, world_size
from pretrain.training.free_memory import free_memory

if TYPE_CHECKING:
    from pretrain.planner.estimate import Planner

# Weights, gradients, float32 copies, two moments and an average of the weights: nothing is sharded.
_MOST_BYTES_PER_PARAMETER = 24
_MOST_DEVICES = 4096  # of the layouts that are tried for a run that does not fit
_ROOM = 0.7  # share of a process's memory that an advised layout's state takes at most
_LAYOUT = (
    *("tensor", "sequence", "pipeline", "virtual_pipeline", "expert"),
    *("zero_stage", "zero_backend"),
)
_WHAT = "the weights, gradients and optimizer state of a process"
_MOST_EPOCHS = 4  # up to so many, repeated data is worth almost as much as new, arXiv 2305.16264


@dataclass(frozen=True)
class Room:
    """What a machine has for a run: bytes for each of its processes, and how many there are."""

    free: float
    processes: int

    def describe(self) -> str:
        """Return the memory in words."""
        where = "on its GPU" if torch.cuda.is_available() else "for it on this machine"
        return f"{self.free / 1e9:,.1f} GB are free {where}"


def preflight(
    config: RunConfig,
    vocab_size: int,
    parameters: int,
    batches: TrainingBatches,
    *,
    force: bool = False,
) -> list[str]:
    """Return warnings of what is likely to go wrong with a run of so many ``parameters``.

    Raises UserError on every process where one cannot hold its part, which is a warning with
    ``force``. Every process must call.
    """

    def check() -> str | None:
        return check_memory(config, vocab_size, parameters, world_size())

    try:
        found = on_every_process(check)
    except UserError as error:
        if not force:
            raise
        found = [str(error)]
    found.append(repeated_data(batches, config.plan.num_steps))
    return list(dict.fromkeys(warning for warning in found if warning is not None))


def epochs_of_sources(batches: TrainingBatches, num_steps: int) -> str:
    """Return a sentence of how often the run reads each source."""
    times = zip(batches.names, batches.epochs(num_steps), strict=True)
    parts = [f"{name.partition('@')[0]} {_count(number)} times" for name, number in times]
    more = f" and {len(parts) - 3} other sources" if len(parts) > 3 else ""
    return f"reads {', '.join(parts[:3])}{more}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def planned_time(config: RunConfig, vocab_size: int) -> str | None:
    """Return what the run is planned to take on GPUs of a known kind, or None."""
    hardware = _known_hardware()
    if hardware is None:
        return None
    from pretrain.planner.expectation import expected_time

    return expected_time(config, vocab_size, hardware, world_size())


def cells_over_segments(config: RunConfig, vocab_size: int) -> CellsOverSegments:
    """Return how context-parallel processes compute sequential cells."""
    parallel = config.parallel
    if parallel.context_cells != "auto":
        return parallel.context_cells
    if parallel.context == 1 or not torch.cuda.is_available():
        return "heads"
    hardware = _known_hardware()
    if hardware is None:
        return "chain"
    from pretrain.planner.expectation import planned_cells

    return planned_cells(config, vocab_size, hardware, world_size())


def _known_hardware() -> str | None:
    """Return the hardware file of this process's GPU, None where there is none."""
    if not torch.cuda.is_available():
        return None
    from pretrain.planner.expectation import known_hardware

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return known_hardware(properties.name, properties.total_memory)


def check_memory(config: RunConfig, vocab_size: int, parameters: int, count: int) -> str | None:
    """Raise UserError where the state of training overfills a process's memory.

    The state is what the planner counts as weights, gradients and optimizer's state, ``count`` the
    number of processes. The message names a layout that fits. Returns a warning where the inputs of
    the blocks, which a forward pass keeps at least, do not fit beside it.
    """
    room = Room(free_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    parallel, train = config.parallel, config.train
    tokens = train.seq_len * parallel.micro_batch_size
    inputs = float(tokens * DTYPES[train.precision].itemsize * config.model.hidden_size)
    most = most_state_bytes(config, parameters)
    if most is not None and most + inputs < room.free / 2:
        return None  # whatever the layout; the planner need not be loaded
    from pretrain.model.spec import passes

    state, why = state_that_fits(config, vocab_size, count, room)
    if why is not None:
        raise UserError(f"{config.name} does not fit: {why}; --force starts it as it is")
    shards = parallel.context * (parallel.tensor if parallel.sequence else 1)
    inputs *= sum(passes(config.model)) / parallel.pipeline / shards
    if state + inputs <= room.free:
        return None
    return (
        f"{_WHAT} take {state / 1e9:,.1f} GB and the inputs of its blocks, which are only "
        f"a part of the activations, {inputs / 1e9:,.1f} GB, but {room.describe()}; expected a "
        "smaller parallel.micro_batch_size, or another layout (python -m pretrain plan)"
    )


def most_state_bytes(config: RunConfig, parameters: int) -> float | None:
    """Return the most that a process's state can take under any layout, None where unknown."""
    return None if config.distill is not None else float(_MOST_BYTES_PER_PARAMETER * parameters)


def state_that_fits(
    config: RunConfig, vocab_size: int, count: int, room: Room
) -> tuple[float, str | None]:
    """Return the bytes of a process's state, of ``count``, and why they do not fit, if so.

    With it a layout is named that would fit.
    """
    from pretrain.planner.estimate import Planner
    from pretrain.planner.hardware import Hardware

    cuda, here = torch.cuda.is_available(), room.processes
    machine = Hardware(
        "this machine",
        memory_gb=max(room.free, 1.0) / 1e9,
        device="cuda" if cuda else "cpu",
        devices_per_node=max(here, torch.cuda.device_count()) if cuda else here,
    )
    planner = Planner(config, vocab_size, machine)
    state = max(sum(stage.values()) for stage in planner.state_memory(config.parallel, count))
    if state <= room.free:
        return state, None
    return state, (
        f"{_WHAT} take {state / 1e9:,.1f} GB, but {room.describe()}; "
        f"{_advice(planner, count, room.free)}"
    )


def _advice(planner: Planner, count: int, free: float) -> str:
    """Return the layout of the fewest processes that fits, as settings."""
    for devices, parallel in _layouts(planner, count):
        state = max(sum(stage.values()) for stage in planner.state_memory(parallel, devices))
        if state <= _ROOM * free:
            changed = [
                f"parallel.{name}={str(value).lower()}"
                for name, value in dataclasses.asdict(parallel).items()
                if value != getattr(planner.config.parallel, name)
            ]
            machines = "such GPUs"
            if planner.hardware.device == "cpu":
                machines = f"{devices // planner.hardware.devices_per_node} such machines"
            return (
                f"{devices} processes on {machines} with {' '.join(changed)} would fit, "
                f"{state / 1e9:,.1f} GB each and the activations (python -m pretrain plan CONFIG "
                f"--devices {devices} --search shows the time of other layouts)"
            )
    return (
        f"no layout of up to {_MOST_DEVICES:,} such processes would fit, expected a smaller model "
        "or more memory"
    )


def _layouts(planner: Planner, count: int) -> Iterator[tuple[int, ParallelConfig]]:
    """Yield layouts that the run could have: of few processes first, and without DeepSpeed."""
    from pretrain.planner.search import candidates

    config, given = copy.copy(planner.config), planner.config.parallel
    moe, devices = config.model.moe, count
    backends = ["megatron", *(["deepspeed"] if find_spec("deepspeed") else [])]
    while devices <= _MOST_DEVICES:
        experts = 1 if moe is None else moe.num_experts
        # Without segments: they shard no weights.
        found = list(candidates(devices, planner.hardware.devices_per_node, experts))
        for backend, layout in itertools.product(backends, found):
            if layout.zero_backend != backend or layout.micro_batch_size != 1:
                continue
            values = {name: getattr(layout, name) for name in _LAYOUT}
            config.parallel = dataclasses.replace(given, **values)
            try:
                check_run_config(config, "")
                check_layout(config, devices, "")
                check_vocab_size(planner.vocab_size, planner.vocab_size, layout.tensor, "")
                planner.check_learning(config.parallel)
            except UserError:
                continue
            yield devices, config.parallel
        devices *= 2


def repeated_data(batches: TrainingBatches, num_steps: int) -> str | None:
    """Return a warning where a source is read more often than brings much, or None."""
    epochs = batches.epochs(num_steps)
    often = [
        f"{name.partition('@')[0]} {times:,.{1 if times < 10 else 0}f} times"
        for name, times in zip(batches.names, epochs, strict=True)
        if times > _MOST_EPOCHS
    ]
    if not often:
        return None
    more = f" and {len(often) - 3} other sources" if len(often) > 3 else ""
    return (
        f"the run reads {', '.join(often[:3])}{more}; data that is repeated more than about "
        f"{_MOST_EPOCHS} times is worth little (arXiv 2305.16264): prepare more, or train less"
    )
