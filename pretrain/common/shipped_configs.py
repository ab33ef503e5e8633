"""The config files that come with the package: the folder ``configs``, wherever it is installed."""

from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "shipped_configs"  # in a checkout a link to configs


def find_config(path: str | Path, folder: str | None = None, *, beside: Path | None = None) -> Path:
    """Return the config file that ``path`` names, relative to the file ``beside`` if there is one.

    A file that is there comes first. A path that begins with ``configs/`` and is not there is
    looked for among the files that come with the package, so that the guides' commands work in any
    folder; so is a bare name such as ``h100``, in the ``folder`` of ``configs`` that the caller
    gives. Where neither has it the path is returned, for the reader to say so.
    """
    path = Path(path)
    if folder is not None and not path.suffix and path.name == str(path) and not path.exists():
        path = Path("configs") / folder / f"{path}.yaml"
    there = path if beside is None else beside.parent / path
    if not there.exists() and path.parts[:1] == ("configs",):
        shipped = SHIPPED.joinpath(*path.parts[1:])
        if shipped.is_file():
            return shipped
    return there
