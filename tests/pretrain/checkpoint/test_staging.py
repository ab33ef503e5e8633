"""Copies for checkpoints: of one moment, in memory that is kept from save to save."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref

import pytest
import torch

from pretrain.checkpoint import staging, writer
from pretrain.checkpoint.sharded_state import Boxes
from pretrain.checkpoint.staging import Staging
from pretrain.checkpoint.state import load_checkpoint
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.config import RunConfig
from pretrain.training.engine import Engine
from tests.helpers.small_model import settings
from tests.helpers.small_training import OPTIMIZER, STATE, batches, make


def state_of(tensors):
    return {str(i): Boxes(t.shape, [((0,) * t.ndim, t)]) for i, t in enumerate(tensors)}


def tensors_of(state):
    return [t for boxes in state.values() for t in boxes.parts.values()]


def tensors():
    return [
        torch.randn(5, 7),
        torch.randn(3, 4, dtype=torch.float64).t(),
        torch.randn(11).bfloat16(),
        torch.randn(2, 0, 3),
        torch.tensor(4),
        torch.randn(6, 6)[::2, 1::3],
    ]


def test_copies_keep_values_shapes_and_offsets():
    sources = tensors()
    state = state_of(sources)
    two = torch.randn(6, 4)
    state["parts"] = Boxes((8, 4), [((0, 0), two[:2]), ((4, 0), two[2:])])
    copies, wait = Staging().copy(state)
    wait()
    assert copies.keys() == state.keys()
    for name, boxes in state.items():
        assert copies[name].full_shape == boxes.full_shape
        assert copies[name].parts.keys() == boxes.parts.keys()
        for offsets, tensor in boxes.parts.items():
            found = copies[name].parts[offsets]
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
            assert found.is_contiguous()
            # What is written of it are its values alone.
            assert found.untyped_storage().nbytes() == tensor.nbytes
    before = [t.clone() for t in tensors_of(copies)]
    for tensor in [*sources, two]:
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(copies), before, strict=True))


def test_memory_is_reused_grows_and_is_freed():
    held = Staging()

    def addresses(sources):
        copies, wait = held.copy(state_of(sources))
        wait()
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(copies), sources, strict=True))
        return [t.data_ptr() for t in tensors_of(copies)]

    first = addresses(tensors())
    assert addresses(tensors()) == first
    assert addresses(tensors()[:2]) == first[:2]
    memory = weakref.ref(held._memory)
    larger, _ = held.copy(state_of([torch.ones(1000)]))
    gc.collect()
    assert memory() is None
    memory = weakref.ref(held._memory)
    held.free()
    assert torch.equal(tensors_of(larger)[0], torch.ones(1000))  # as long as it is used
    del larger
    gc.collect()
    assert memory() is None


class Streams:
    """The streams of a GPU, which write down what is asked of them; everything runs at once."""

    def __init__(self):
        self.log: list[object] = []
        self.now, streams = "training", self

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                streams.log.append(f"{self.name} waits for {other.name}")

        class Event:
            def record(self):
                streams.log.append(f"{streams.now} marks")

            def synchronize(self):
                streams.log.append("host waits for mark")

        self.Stream, self.Event = Stream, Event

    def current_stream(self):
        return self.Stream("training")

    @contextlib.contextmanager
    def stream(self, stream):
        self.now = stream.name
        yield
        self.now = "training"


def test_streams_wait_for_each_other_and_the_host_for_neither(monkeypatch):
    streams = Streams()
    monkeypatch.setattr(staging.torch, "cpu", streams)
    held = Staging()
    source = torch.ones(3)
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda *_, **options: streams.log.append((streams.now, options))
    )
    _, wait = held.copy(state_of([source]))
    assert streams.log == [
        "side waits for training",
        ("side", {"non_blocking": True}),
        "side marks",
        "training waits for side",
    ]
    wait()
    assert streams.log[-1] == "host waits for mark"


class Library:
    """CUDA's runtime, as far as memory is pinned by it."""

    def __init__(self, status):
        self.status, self.pinned, self.log = status, {}, []

    def cudaHostRegister(self, address, size, flags):
        self.log.append("pin")
        if self.status == 0:
            self.pinned[address] = size
        return self.status

    def cudaHostUnregister(self, address):
        del self.pinned[address]


@pytest.mark.parametrize("status", [0, 2])
def test_memory_is_pinned_once_and_unpinned(status, monkeypatch):
    """And where it cannot be, it is plain memory."""
    library = Library(status)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: library)
    held = Staging()
    held._pin = True
    for _ in range(3):
        copies, wait = held.copy(state_of(tensors()))
        wait()
    assert library.log == ["pin"]
    assert len(library.pinned) == (status == 0)
    assert held._memory is not None
    assert all(size == held._memory.nbytes for size in library.pinned.values())
    held.free()
    del copies
    gc.collect()
    assert not library.pinned


@pytest.mark.usefixtures("processes")
def test_a_save_is_of_the_moment_it_was_begun(tmp_path, monkeypatch):
    """Training goes on while it is written; a second save has the same memory."""
    held = []
    plain = writer.save_state

    def later(local, folder, group):
        held.append([t.data_ptr() for t in tensors_of(local)])
        engine.train_step(batches(7), 1e-2)  # before anything is written
        plain(local, folder, group)

    monkeypatch.setattr(writer, "save_state", later)
    engine = Engine(make(), OPTIMIZER)
    config = RunConfig("test", settings())
    checkpoints = CheckpointWriter(tmp_path, config)
    for step in (1, 2):
        engine.train_step(batches(step), 1e-2)
        reference = [p.clone() for p in engine.parts[0].parameters()]
        checkpoints.save(engine, dataclasses.replace(STATE, step=step))
        path = checkpoints.wait()
        assert path is not None
        other = Engine(make(), OPTIMIZER)
        load_checkpoint(path, other)
        for a, b in zip(other.parts[0].parameters(), reference, strict=True):
            assert torch.equal(a, b)
    assert held[0] == held[1]
    checkpoints.close()
    assert checkpoints._staging._memory is None
