"""Threads of Python that share out the parts of an op on a CPU, each with operations of its own.

torch divides every operation over its threads, which wait for each other at its end: many small
operations, one after another, then take longer than on one thread.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch


def run_in_threads(task: Callable[[int], None], count: int) -> None:
    """Run ``task(0)`` to ``task(count - 1)``, on as many threads as torch's operations have.

    The tasks make no autograd graph, and their own operations are not divided further.
    """
    numbers, threads = itertools.count(), torch.get_num_threads()  # next() is atomic

    def work() -> None:
        with torch.no_grad():
            while (i := next(numbers)) < count:
                task(i)

    others = min(threads, count) - 1
    if others < 1:
        return work()
    pool = _pool(threads - 1, os.getpid())
    futures = [pool.submit(work) for _ in range(others)]
    torch.set_num_threads(1)
    try:
        work()
    finally:
        wait(futures)
        torch.set_num_threads(threads)
    for future in futures:
        future.result()


@functools.cache
def _pool(count: int, process: int) -> ThreadPoolExecutor:
    """Return threads of this process: those of its parent do not run in a fork.

    All have started when it returns: each sets the number of torch's threads, and so that of
    threads which start later.
    """
    pool = ThreadPoolExecutor(count, "parts-of-ops", torch.set_num_threads, (1,))
    barrier = threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(barrier.wait)
    barrier.wait()
    return pool
