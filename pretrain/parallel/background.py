"""Work in a thread beside training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from pretrain.parallel.processes import local_device

T = TypeVar("T")


def in_background(function: Callable[[], T], name: str) -> tuple[Future[T], threading.Thread]:
    """Call ``function`` in a thread called ``name``, on this process's GPU if there is one.

    Returns what will be its result, or raise what it raised, and the thread. That is a daemon, so
    that a process which ends for another reason does not wait for it.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(local_device())  # a thread begins on the first GPU
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return future, thread
