"""Keep the results of synthetic runs, one file each: what is there is not run again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from rich.text import Text

from evals.synthetic.settings import SyntheticConfig
from evals.synthetic.training import run
from pretrain.common.files import write_json
from pretrain.common.screen import plain_console


def result_path(config: SyntheticConfig, output: Path) -> Path:
    """Return the path of the result of these settings."""
    digest = hashlib.sha256(repr(dataclasses.asdict(config)).encode()).hexdigest()[:8]
    pattern = "".join(c if c.isalnum() or c == "_" else "-" for c in config.pattern)
    return output / f"{config.task}-{pattern[:80]}-{digest}.json"


def kept_result(config: SyntheticConfig, output: Path) -> dict[str, Any] | None:
    """Return the result of these settings if it exists."""
    path = result_path(config, output)
    known: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return known


def result_of(config: SyntheticConfig, output: Path, title: str | None = None) -> dict[str, Any]:
    """Return the result of ``config``, running it unless its result exists.

    While it runs the screen shows its step, and in the end a line with its scores, which begins
    with ``title``, or else with the run's settings.
    """
    known = kept_result(config, output)
    if known is not None:
        return known
    output.mkdir(parents=True, exist_ok=True)
    console = plain_console(stderr=True)
    title = title or f"{config.task}, {label(dataclasses.asdict(config))}"
    title = f"{title}, seed {config.seed}"
    with console.status(Text(title)) as status:

        def on_step(step: int, loss: float) -> None:
            if step % 10 == 0:
                status.update(Text(f"{title}: step {step}/{config.steps}, loss {loss:.4f}"))

        result = run(config, on_step)
    scores = ", ".join(
        f"{t['length']}{' by {passes}'.format(**t) if 'passes' in t else ''}: {t['accuracy']:.4f}"
        for t in result["tests"]
    )
    console.print(
        f"{title}: loss {result['final_loss']:.4f}, accuracy {scores}, "
        f"{result['minutes']:.2f} CPU minutes"
    )
    write_json(result_path(config, output), result)
    return result


def label(settings: dict[str, Any]) -> str:
    """Return a label of a run's settings: the pattern and the mixers' changed settings."""
    parts = [
        f"{key}={json.dumps(value)}"
        for mixer in settings["mixers"].values()
        for key, value in mixer.items()
    ]
    loop = settings.get("recursion") or {}
    parts += [f"recursion.{key}={json.dumps(value)}" for key, value in loop.items()]
    return " ".join([settings["pattern"], *parts])
