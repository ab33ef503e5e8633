"""``python -m data_prep CONFIG [key=value ...]``, and ``inspect`` and ``verify`` for its result."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from pathlib import Path
from types import FrameType

from pretrain.common.errors import run_command


class Terminated(BaseException):
    """Raised on SIGTERM or SIGHUP, so that everything is closed on the way out."""

    def __init__(self, number: int):
        self.number = number


def main() -> int:
    """Run the command of ``sys.argv`` and return the exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, _terminate)
    try:
        return _main(sys.argv[1:])
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Terminated as end:
        status = 128 + end.number
    words = "interrupted: complete shards are kept, run the same command again to resume"
    with contextlib.suppress(OSError):  # of a terminal that is closed
        print("interrupted" if _only_reads(sys.argv[1:]) else words, file=sys.stderr)
    return status


def _only_reads(arguments: list[str]) -> bool:
    return bool(arguments) and arguments[0] in ("inspect", "verify")


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


def _main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Tokenize text into shards for pretraining.",
        epilog="python -m data_prep inspect DIR shows what a data set holds; "
        "python -m data_prep verify DIR checks it against its hashes.",
    )
    if _only_reads(arguments):
        parser.add_argument("command")
        parser.add_argument("directory", help="folder of a data set")
        options = parser.parse_args(arguments)
        from data_prep import inspection

        getattr(inspection, options.command)(options.directory)
        return 0
    parser.add_argument("config", help="a YAML file, such as configs/data/stdlib.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as output=data/x")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what the output folder holds"
    )
    options = parser.parse_intermixed_args(arguments)
    from data_prep.config import load_data_config
    from data_prep.next_step import next_step
    from data_prep.prepare import prepare

    config = load_data_config(options.config, options.overrides)
    manifest = prepare(config, options.overwrite)
    print(next_step(manifest, Path(config.output), Path(options.config)))
    return 0


if __name__ == "__main__":
    run_command(main)
