"""Starts ``python -m MODULE`` as forks of this process, which has imported the libraries already.

Importing torch and megatron-core takes seconds, most of the time of a short command. Only libraries
are imported here: a fork imports the project's own modules itself, as a new interpreter does, and
ends as one does. Run by tests/helpers/processes.py with a socket, over which each request comes as
JSON with four files: standard input, output and error, and a pipe that is told the process's id and
then its exit status.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

# What training imports. Not what needs an optional package: whether it is there is asked by tests.
LIBRARIES = [
    "numpy",
    "sentencepiece",
    "rich.console",
    "rich.table",
    "rich.progress",
    "yaml",
    "psutil",
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.nn.attention.varlen",
    "torch.distributed.checkpoint.default_planner",
    "torch.utils.checkpoint",
    "torch.utils.flop_counter",
    "megatron.core",
    "megatron.core.tensor_parallel",
    "megatron.core.optimizer",
    "megatron.core.distributed",
    "megatron.core.pipeline_parallel",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.transformer.transformer_config",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.datasets.indexed_dataset",
]


def serve(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for each request, and return it in the process that is to run it."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, 2**20, 4)
        if not message:
            return None
        if os.fork() == 0:
            connection.close()
            return json.loads(message), files
        for file in files:
            os.close(file)


def watch(files: list[int]) -> None:
    """Fork once more and return in the child; the parent waits for it and reports."""
    *standard, report = files
    child = os.fork()
    if child:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for file in standard:
            os.close(file)
        os.write(report, f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    os.close(report)
    for target, file in enumerate(standard):
        os.dup2(file, target)
        os.close(file)


def become(request: dict[str, Any]) -> None:
    """Run the module with the arguments, environment and folder of the request."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    own = [x for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x]
    sys.path[:] = [request["folder"], *(str(Path(x).resolve()) for x in own), *sys.path]
    sys.argv[:] = ["-m", *request["arguments"]]
    if os.environ.get("PYTHONUNBUFFERED"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    # Neither this file's folder nor what PYTHONPATH named here: each request has its own.
    named = {str(Path(x).resolve()) for x in os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    named.add(str(Path(__file__).parent))
    sys.path[:] = [x for x in sys.path if x not in named and str(Path(x).resolve()) not in named]
    with warnings.catch_warnings(action="ignore"):
        for library in LIBRARIES:
            importlib.import_module(library)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who wait are not waited for
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the tests', which end this one
    taken = serve(connection)
    if taken is None:
        return
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    request, files = taken
    watch(files)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    become(request)


if __name__ == "__main__":
    main()
