"""The line that tells what to do with a data set once it is there."""

from __future__ import annotations

from pathlib import Path

from pretrain.common.config_files import load_values
from pretrain.common.errors import ConfigError
from pretrain.common.shipped_configs import find_config
from pretrain.data.manifest import Manifest


def next_step(manifest: Manifest, output: Path, data_config: Path) -> str:
    """Return a line that names a run's config with this data, or the setting to put into one.

    Configs are looked for where this project keeps them: in ``runs``, beside the data config's
    folder; the demo comes first.
    """
    if not manifest.counts("train").tokens:
        return "next: add documents, because there is none to train on"
    folder = find_config(data_config).parent.parent
    found = sorted((folder / "runs").rglob("*.yaml"), key=lambda p: (p.stem != "demo", p))
    for path in found:
        if output.resolve() in _data_of(path):
            named = data_config.parent.parent / path.relative_to(folder)
            return f"next: python -m pretrain {named}"
    return f"next: set data: {{path: {output}}} in a run's config, and python -m pretrain CONFIG"


def _data_of(run_config: Path) -> list[Path]:
    """Return the data sets that a run's config names, none for what is no such config."""
    try:
        data = load_values(run_config).get("data")
    except ConfigError:
        return []
    if not isinstance(data, dict):
        return []
    entries = [data, *(e for e in data.get("blend") or [] if isinstance(e, dict))]
    return [Path(str(e["path"])).resolve() for e in entries if e.get("path") is not None]
