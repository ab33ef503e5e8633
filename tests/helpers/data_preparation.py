"""Running the command, and what tests ask of its results."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from data_prep.config import DataPrepConfig
from pretrain.common.config_loader import build_config

REPOSITORY = Path(__file__).parents[2]


def command(*arguments, **options):
    """Start ``python -m data_prep`` as a person would."""
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs, CI's perhaps, with SIGINT ignored; a person's is not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        **options,
    )


def run_command(*arguments):
    """The finished command: returncode, stdout, stderr."""
    process = command(*arguments)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def write_config(path, **settings):
    path.write_text(yaml.safe_dump(settings))
    return path


def files_config(output, paths, tokenizer, **settings):
    """A config of one source of files with an existing tokenizer."""
    values = {
        "output": str(output),
        "sources": [{"name": "text", "kind": "files", "paths": [str(p) for p in paths]}],
        "tokenizer": {"path": str(tokenizer)},
        "validation_fraction": 0.1,
        "shard_bytes": 100_000,
        "processes": 1,
        **settings,
    }
    return build_config(DataPrepConfig, values, "test")


def digests(directory):
    """Content of every file of a data set but the manifest, whose date differs."""
    return {p.name: p.read_bytes() for p in Path(directory).iterdir() if p.name != "manifest.json"}


def wait_until_gone(processes, seconds=10):
    limit = time.monotonic() + seconds
    while any(alive(process) for process in processes):
        assert time.monotonic() < limit, "processes were left behind"
        time.sleep(0.05)


def alive(process):
    try:
        status = Path(f"/proc/{process}/stat").read_text()
        return status.rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
