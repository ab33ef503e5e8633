"""The command ``python -m launch watch``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from pretrain.common.argument_types import count
from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes
from pretrain.common.outputs import check_file

PORT = 8765
_ENDINGS = (".html", ".json")


def watch(arguments: Sequence[str]) -> int:
    """Serve a page that follows runs until Ctrl-C, or write it as it is now."""
    parser = argparse.ArgumentParser(
        prog="python -m launch watch",
        description="Show runs and grids as they train, on a page for this machine alone. It reads "
        "the files of run directories, sends nothing anywhere, and ends with Ctrl-C.",
    )
    parser.add_argument(
        "folders",
        nargs="*",
        default=["runs"],
        metavar="DIR",
        help="directories of runs or grids, folders of them, or globs (runs)",
    )
    parser.add_argument("--port", type=count, default=PORT, help=f"of 127.0.0.1 ({PORT}); 0: any")
    parser.add_argument(
        "--once",
        type=Path,
        metavar="FILE",
        help="write the page as it is now (.html), or its numbers (.json), and end",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.port > 65535:
        raise UserError(f"--port is {options.port}, expected a number from 0 to 65535")
    if options.once is not None:
        if options.once.suffix not in _ENDINGS:
            raise UserError(f"--once is {options.once}, expected a name ending in .html or .json")
        check_file(options.once, "--once")
    from launch.watch.server import WatchServer, json_of, page
    from launch.watch.watched import Watched

    watched = Watched(options.folders)
    if options.once is not None:
        state = watched.state()
        text = json_of(state) + "\n" if options.once.suffix == ".json" else page(state)
        options.once.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(options.once, text.encode(errors="replace"))
        print(f"written to {options.once}")
        return 0
    with WatchServer(watched, options.port) as server, contextlib.suppress(KeyboardInterrupt):
        runs = f"{len(watched)} run{'s' if len(watched) > 1 else ''}"
        print(f"{server.url} follows {runs} in {watched.title}; Ctrl-C ends it", flush=True)
        server.serve_forever()
    return 0
