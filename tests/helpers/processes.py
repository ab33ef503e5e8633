"""Starting the project's commands: as new interpreters, as quick forks, and on several processes.

``start``, ``run`` and ``run_on`` fork a process that has imported torch and megatron-core, see
fork_server.py; what is run is otherwise what ``python -m MODULE`` runs. ``run_interpreter`` starts
an interpreter, for what is about starting, as ``TORCHRUN`` starts PyTorch's launcher.
"""

from __future__ import annotations

import array
import atexit
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch.distributed as dist

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
_server: list[socket.socket] = []


def _connection() -> socket.socket:
    """Return a connection to the process that forks, which starts when it is first needed."""
    if not _server:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/helpers/fork_server.py"), str(theirs.fileno())],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        _server.append(ours)
        atexit.register(ours.close)  # with which it ends
    return _server[0]


def _temporary_file() -> IO[bytes]:
    return tempfile.TemporaryFile()


class Process:
    """A process that was started, with the methods of ``subprocess.Popen`` that tests use."""

    def __init__(
        self,
        module: str,
        arguments: tuple[object, ...],
        folder: Path | str,
        environment: Mapping[str, str],
        text: bytes,
        together: bool,
    ):
        self.args = [module, *map(str, arguments)]
        self.returncode: int | None = None
        self._read = b""
        given = _temporary_file()
        given.write(text)
        given.seek(0)
        self._output = _temporary_file()
        self._errors = self._output if together else _temporary_file()
        self._report, report = os.pipe()
        request = {
            "module": module,
            "arguments": self.args[1:],
            "folder": str(folder),
            "environment": dict(environment),
        }
        files = [given.fileno(), self._output.fileno(), self._errors.fileno(), report]
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
        _connection().sendmsg([json.dumps(request).encode()], passed)
        os.close(report)
        given.close()
        while b"\n" not in self._read:
            found = os.read(self._report, 64)
            assert found, "the process that forks has ended"
            self._read += found
        self.pid = int(self._read.split(b"\n")[0])

    def _has_more(self, seconds: float | None) -> bool:
        """Wait for more of the report; not by select(), which knows no descriptor above 1,023."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._report, selectors.EVENT_READ)
            return bool(selector.select(seconds))

    def poll(self, seconds: float | None = 0) -> int | None:
        """Return the exit status, or None if the process has not ended within the time."""
        if self.returncode is not None:
            return self.returncode
        if self._read.count(b"\n") < 2 and self._has_more(seconds):
            self._read += os.read(self._report, 64) or b"-1\n"
        if self._read.count(b"\n") > 1:
            self.returncode = int(self._read.split(b"\n")[1])
            os.close(self._report)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def stdout(self) -> bytes:
        """What it has written."""
        return os.pread(self._output.fileno(), 2**30, 0)

    @property
    def stderr(self) -> bytes:
        return b"" if self._errors is self._output else os.pread(self._errors.fileno(), 2**30, 0)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, and return standard output and error."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.stdout.decode(), self.stderr.decode()


def start(
    module: str,
    *arguments: object,
    folder: Path | str = ROOT,
    environment: Mapping[str, str] | None = None,
    text: bytes = b"",
    together: bool = True,
) -> Process:
    """Start ``python -m module``; ``together``: standard output and error come as one."""
    environment = ENVIRONMENT if environment is None else environment
    return Process(module, arguments, folder, environment, text, together)


def run(
    module: str,
    *arguments: object,
    folder: Path | str = ROOT,
    environment: Mapping[str, str] | None = None,
    text: bytes = b"",
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module`` to its end."""
    process = start(
        module, *arguments, folder=folder, environment=environment, text=text, together=False
    )
    output, errors = process.communicate(timeout)
    status = process.wait()
    return subprocess.CompletedProcess([module, *map(str, arguments)], status, output, errors)


def run_interpreter(
    *words: object, environment: Mapping[str, str] | None = None, timeout: float = 600
) -> tuple[int, str]:
    """Return exit status and output of ``python WORDS``, a new interpreter."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=ENVIRONMENT if environment is None else environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=timeout,
    )
    return done.returncode, done.stdout


def run_on(count: int, module: str, *arguments: object, timeout: float = 900) -> str:
    """Run a module on several processes, with the variables and the store that torchrun gives
    them, and return what the first one writes. If one fails, all are ended, and the test fails."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        **{k: v for k, v in ENVIRONMENT.items() if not k.startswith("TORCHELASTIC")},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    processes = [
        start(module, *arguments, environment={**common, "RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(count))
    ]
    end = time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            failed = [p for p in processes if p.returncode]
            if failed:
                time.sleep(1)  # the others may have a word to say, too
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
    outputs = [p.communicate(10)[0] for p in processes]
    states = [p.returncode for p in processes]
    assert states == [0] * count, f"{module}: {states}\n" + "\n".join(o[-5000:] for o in outputs)
    return outputs[0]
