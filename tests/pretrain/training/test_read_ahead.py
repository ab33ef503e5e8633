"""Reading ahead gives the batches that reading gives, whatever is asked for in between."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.common.errors import UserError
from pretrain.config import DataConfig, TrainConfig
from pretrain.data.batches import TrainingBatches, open_data
from pretrain.training import read_ahead
from pretrain.training.callbacks import Callback
from pretrain.training.read_ahead import ReadAhead
from pretrain.training.trainer import Trainer
from tests.helpers.training_run import QUICK, Run

STEPS = 12
# Batches of 32, 64, then 128 tokens.
CONFIG = TrainConfig(
    steps=STEPS,
    seq_len=16,
    global_batch_tokens=128,
    batch_warmup_start=32,
    batch_warmup_steps=6,
)


@pytest.fixture(scope="module")
def data(corpus):
    return open_data(DataConfig(path=str(corpus)))


class Recorded(TrainingBatches):
    """Batches that note what is read, and fail where they shall."""

    def __init__(self, data, failing=()):
        super().__init__(data, CONFIG, 2, seed=3)
        self.read, self.failing = [], failing

    def micro_batches(self, step, rank=0, size=1, *, offset=0):
        self.read.append((step, offset))
        if (step, offset) in self.failing:
            raise UserError(f"step {step} cannot be read")
        return super().micro_batches(step, rank, size, offset=offset)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.loss_mask, b.loss_mask)
        assert a.sequences.lengths == b.sequences.lengths


def threads():
    return [t for t in threading.enumerate() if t.name == "read-ahead"]


@given(
    walk=st.lists(
        st.tuples(st.sampled_from(["next", "again", "back", "skip"]), st.integers(1, 3)),
        max_size=12,
    ),
    size=st.integers(1, 2),
)
def test_any_walk_through_the_steps_gives_the_same_batches(walk, size, data):
    """Also through rollbacks, skipped data and batches whose size grows; two processes' shares."""
    batches = TrainingBatches(data, CONFIG, 2, seed=3)
    step = offset = 0
    with ReadAhead(batches, STEPS) as ahead:
        for move, far in [("next", 0), *walk]:
            rank = size - 1
            found = ahead.micro_batches(step, rank, size, offset=offset)
            assert_same(found, batches.micro_batches(step, rank, size, offset=offset))
            step += move == "next"
            if move in ("back", "skip"):
                step = max(step - far, 0)
            offset += 128 * far * (move == "skip")
            step = min(step, STEPS - 1)
    assert not threads()


def test_every_batch_is_read_once_and_none_after_the_last(data):
    batches = Recorded(data)
    with ReadAhead(batches, STEPS) as ahead:
        sizes = [sum(b.tokens.numel() for b in ahead.micro_batches(step)) for step in range(STEPS)]
    assert sizes == [CONFIG.batch_tokens(step) for step in range(STEPS)]
    assert len(set(sizes)) == 3
    assert batches.read == [(step, 0) for step in range(STEPS)]


def test_the_next_batch_is_read_before_it_is_asked_for(data):
    batches = Recorded(data)
    with ReadAhead(batches, STEPS) as ahead:
        ahead.micro_batches(4)
        for thread in threads():
            thread.join()
        assert batches.read == [(4, 0), (5, 0)]
        ahead.micro_batches(2, offset=128)  # a rollback
        for thread in threads():
            thread.join()
        assert batches.read[2:] == [(2, 128), (3, 128)]


def test_an_error_is_raised_where_its_batch_is_asked_for(data):
    batches = Recorded(data, failing=[(2, 0)])
    with ReadAhead(batches, STEPS) as ahead:
        ahead.micro_batches(0)
        ahead.micro_batches(1)
        with pytest.raises(UserError, match=r"^step 2 cannot be read$"):
            ahead.micro_batches(2)
        with pytest.raises(UserError, match=r"^step 2 cannot be read$"):
            ahead.micro_batches(2)
        ahead.micro_batches(1)
        ahead.micro_batches(2, offset=128)  # other data: that which fails was for nobody
    assert not threads()


def test_a_read_that_hangs_does_not_hold_the_end(data, monkeypatch):
    monkeypatch.setattr(read_ahead, "_SECONDS_TO_END", 0.01)
    released = threading.Event()

    class Hanging(Recorded):
        def micro_batches(self, step, *arguments, **options):
            if step == 1:
                released.wait()
            return super().micro_batches(step, *arguments, **options)

    with ReadAhead(Hanging(data), STEPS) as ahead:
        ahead.micro_batches(0)
    (thread,) = threads()
    assert thread.daemon
    released.set()
    thread.join()


def test_batches_for_a_gpu_are_pinned_by_the_thread(data, monkeypatch):
    pinned = []

    def pin(tensor):
        pinned.append(threading.current_thread().name)
        return tensor.clone()

    batches = TrainingBatches(data, CONFIG, 2, seed=3)
    expected = batches.micro_batches(0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with ReadAhead(batches, 1) as ahead:
        assert_same(ahead.micro_batches(0), expected)
    assert pinned == ["read-ahead"] * 4 * len(expected)


@pytest.mark.usefixtures("no_groups")
def test_a_run_equals_one_that_reads_when_it_needs(tmp_path, corpus, monkeypatch):
    """With batches that grow, stopped in the middle and resumed."""
    options = [
        *QUICK,
        "train.global_batch_tokens=256",
        "train.batch_warmup_start=64",
        "train.batch_warmup_steps=6",
    ]

    class Stop(Callback):
        def after_step(self, result):
            if self.trainer.state.step == 5:
                self.trainer.request_stop("a test")

    def finish(name):
        run = Run(tmp_path, corpus, name)
        assert Trainer(run.config, overrides=options, callbacks=Stop()).fit().step == 5
        assert not threads()
        Trainer(run.config, overrides=options).fit()
        return run.losses

    found = finish("ahead")
    assert not threads()

    def plain(self, step, rank, size, *, offset):
        return self._batches.micro_batches(step, rank, size, offset=offset)

    monkeypatch.setattr(ReadAhead, "micro_batches", plain)
    assert found == finish("plain")
