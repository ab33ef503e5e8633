"""Shared by all tests: one process group of one process, and few threads."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small tensors gain nothing from a second thread, and threads that wait for each other on a busy
# machine are ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU kernels run in Triton's interpreter, which must be chosen before they are made.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")

from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=12, derandomize=True)
settings.load_profile("default")


# By selection, roughly how many seconds the longest files took: for where no run has been before.
SECONDS = json.loads((Path(__file__).parent / "helpers/seconds.json").read_text())


def _selection(config):
    """Return this selection by markers, as a name."""
    return config.option.markexpr.replace(" ", "-") or "all"


def pytest_ignore_collect(collection_path, config):
    """Leave out files without slow tests where those alone are run: to import all takes a while."""
    if config.option.markexpr != "slow" or not collection_path.match("test_*.py"):
        return None
    return True if "mark.slow" not in collection_path.read_text(encoding="utf-8") else None


def pytest_collection_modifyitems(config, items):
    """Files that took longest the last time first, so that no worker ends long after the others;
    those that have never been run by ``SECONDS``, and with slow tests first."""
    known = dict(SECONDS.get(_selection(config), {}))
    if hasattr(config, "cache"):
        known |= config.cache.get(f"durations/{_selection(config)}", {})
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (-known.get(item.location[0], 0), item.path not in slow))


def pytest_collection_finish():
    """Have the garbage collector pass over what has been imported, which stays: it is quicker."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter, config):
    """Keep how long each file took, of a run of all."""
    every = config.args_source == config.ArgsSource.TESTPATHS and not config.option.keyword
    if not every or not hasattr(config, "cache"):
        return
    took: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                name = report.location[0]
                took[name] = took.get(name, 0.0) + report.duration
    config.cache.set(f"durations/{_selection(config)}", took)


@pytest.fixture(autouse=True)
def environment():
    """As it was, after every test: what one sets would reach the processes that others start."""
    before = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    yield
    for name in set(os.environ) - set(before) - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def linear():
    """As it was, after every test: DeepSpeed's ZeRO-3 replaces torch's function for good."""
    before = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = before


@pytest.fixture(scope="module", autouse=True)
def no_groups_left():
    """Of every file of tests, whatever it started: others find none, or those they ask for."""
    yield
    started = sys.modules.get("pretrain.parallel.processes")
    if started is not None:
        started.stop_processes()  # also since gloo's threads may abort while the interpreter ends
    gc.collect()  # models in cycles hold groups that have ended, whose sockets are then closed


@pytest.fixture(scope="module")
def processes(no_groups_left):
    """megatron-core's groups on a single process."""
    from pretrain.parallel.processes import start_processes

    start_processes()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _prepared(folder, files, tokenizer):
    """A data directory of these texts."""
    from data_prep.config import load_data_config
    from data_prep.prepare import prepare

    for number, text in enumerate(files):
        (folder / f"{number:02d}.py").write_text(text)
    (folder / "data.yaml").write_text(
        f"output: {folder / 'data'}\n"
        f"sources: [{{name: code, kind: files, paths: ['{folder}/*.py']}}]\n"
        f"tokenizer: {tokenizer}\nvalidation_fraction: 0.2\nprocesses: 1\n"
    )
    prepare(load_data_config(folder / "data.yaml"))
    return folder / "data"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small prepared data directory: 40 documents, a 300-piece tokenizer."""
    files = [
        "\n".join(f"def function_{i}_{j}(x, y):\n\treturn x * {j} + y - {i}\n" for j in range(12))
        for i in range(40)
    ]
    return _prepared(tmp_path_factory.mktemp("corpus"), files, "{vocab_size: 300}")


@pytest.fixture(scope="session")
def other_corpus(tmp_path_factory, corpus):
    """Other text under the same tokenizer: 30 documents of very different lengths."""
    files = [
        "\n".join(f"word{(i * j) % 7} and number {j}" for j in range(1 + i * i // 40))
        for i in range(30)
    ]
    tokenizer = f"{{path: {corpus / 'tokenizer.model'}}}"
    return _prepared(tmp_path_factory.mktemp("other"), files, tokenizer)
