import math
import os
import signal
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.tokenizer_training import is_validation
from data_prep.workers import WorkerPool, count_bytes, tokenize
from pretrain.common.errors import UserError
from tests.helpers.data_preparation import wait_until_gone


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=10), st.integers(1, 8))
def test_bytes_and_pairs_are_counted_within_documents(documents, slice_bytes):
    unigrams, bigrams = count_bytes(documents, slice_bytes)
    pairs = Counter(a * 256 + b for d in documents for a, b in pairwise(d))
    assert dict(enumerate(unigrams.tolist())) == {
        i: b"".join(documents).count(i) for i in range(256)
    }
    assert {i: n for i, n in enumerate(bigrams.tolist()) if n} == dict(pairs)


def test_a_batch_is_split_tokenized_and_counted(model_file, tokenizer):
    texts = [f"document {i}\n" for i in range(50)]
    documents = [text.encode() for text in texts] + [b"", b"\xff", b"\xed\xa0\x80", b""]
    batch = tokenize(documents, str(model_file), 0.4)
    assert batch.skipped == {"undecodable": 2, "empty": 2}
    assert batch.text_bytes == sum(map(len, texts))
    for split, valid in (("train", False), ("valid", True)):
        part = batch.splits[split]
        expected = [t for t in texts if is_validation(t.encode(), 0.4) == valid]
        ends = np.cumsum(part.lengths)
        found = np.split(part.tokens, ends[:-1])
        assert all(tokens[-1] == tokenizer.eod_id for tokens in found)
        assert [tokenizer.decode(tokens) for tokens in found] == expected
        assert part.text_bytes == sum(map(len, expected))


def test_results_come_in_order():
    with WorkerPool(2) as pool:
        items = (((n,), str(n)) for n in (40, 3, 20, 1, 2, 0, 5, 6, 7, 8))
        found = list(pool.map(math.factorial, items))
    assert found == [(math.factorial(int(label)), label) for _, label in found]
    assert [label for _, label in found] == ["40", "3", "20", "1", "2", "0", "5", "6", "7", "8"]


def test_only_a_few_batches_are_in_flight():
    asked = []

    def items():
        for n in range(50):
            asked.append(n)
            yield (n,), n

    with WorkerPool(1) as pool:
        results = pool.map(math.factorial, items())
        next(results)
        assert len(asked) <= 4


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(UserError, match="a worker process was killed"), WorkerPool(1) as pool:
        worker = pool.result(pool.submit(os.getpid))
        os.kill(worker, signal.SIGKILL)
        pool.result(pool.submit(math.factorial, 3))


def test_workers_leave_signals_to_the_parent_and_go_with_an_error():
    def fail():
        with WorkerPool(1) as pool:
            worker = pool.result(pool.submit(os.getpid))
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(worker, number)
            assert pool.result(pool.submit(os.getpid)) == worker
            busy = pool.submit(time.sleep, 300)
            while not busy.running():
                time.sleep(0.01)
            time.sleep(0.5)
            raise RuntimeError(str(worker))

    start = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        fail()
    wait_until_gone([int(str(error.value))])
    assert time.monotonic() - start < 300, "the pool waited for its workers' work"
