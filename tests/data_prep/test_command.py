"""The command as a person meets it: real processes, what they print, how they exit."""

import io
import re
import shutil
import time

import pytest

from data_prep.screen import ProgressDisplay
from pretrain.common.screen import plain_console
from pretrain.data.manifest import Manifest
from tests.helpers.data_preparation import run_command, write_config


@pytest.fixture(scope="module")
def standard_library(tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "stdlib"
    result = run_command("configs/data/stdlib.yaml", f"output={output}")
    return result, output


def test_the_standard_library_becomes_a_data_set(standard_library):
    result, output = standard_library
    assert result.returncode == 0, result.stderr
    assert f"next: set data: {{path: {output}}} in a run's config" in result.stdout
    assert "bits per byte: 4." in result.stdout
    first, *progress = result.stderr.splitlines()
    assert first == "training the tokenizer: bpe, 4,096 pieces"
    # Of what takes some seconds.
    assert all(re.fullmatch(r"stdlib: [\d,]+ documents, .* left", line) for line in progress)
    manifest = Manifest.load(output)
    assert manifest.dtype == "uint16"
    train = manifest.counts("train")
    assert train.bytes > 8e6
    assert 2.5 < train.bytes / train.tokens < 4.5
    share = manifest.counts("valid").documents / manifest.sources[0].documents
    assert 0.02 < share < 0.08


def test_again_it_does_nothing(standard_library):
    _, output = standard_library
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    result = run_command("configs/data/stdlib.yaml", f"output={output}")
    assert result.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    assert result.stderr == ""  # no document was read
    assert "complete and unchanged: nothing to do" in result.stdout


def test_inspect_and_verify(standard_library):
    _, output = standard_library
    assert run_command("verify", output).returncode == 0
    shown = run_command("inspect", output)
    assert shown.returncode == 0, shown.stderr
    assert "length of documents" in shown.stdout
    assert re.search(r"^import ", shown.stdout, re.MULTILINE)


def test_verify_exits_with_2_naming_the_damaged_shard(small_data, tmp_path):
    data = shutil.copytree(small_data, tmp_path / "data")
    (data / "train-text-00001.bin").write_bytes(b"x")
    result = run_command("verify", data)
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*train-text-00001\.bin is damaged .*\n", result.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope.yaml"], "no config file at nope.yaml"),
        (["configs/data/stdlib.yaml", "shard_byte=3"], "did you mean 'shard_bytes'"),
        (["configs/data/stdlib.yaml", "tokenizer.path=nope.model"], "no tokenizer file at nope"),
        (["inspect", "nope"], "nope holds no manifest.json"),
        (["verify", "nope"], "nope holds no manifest.json"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(arguments, words):
    result = run_command(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_broken_row_is_one_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text"\n')
    config = write_config(
        tmp_path / "a.yaml",
        output=str(tmp_path / "out"),
        sources=[{"name": "a", "kind": "files", "paths": [str(tmp_path / "a.jsonl")]}],
        validation_fraction=0,
    )
    result = run_command(config)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert re.match(r"error: .*a\.jsonl, line 2: not valid JSON", last)
    assert "Traceback" not in result.stderr


def test_progress_is_plain_lines_where_there_is_no_terminal(monkeypatch):
    display = ProgressDisplay()
    screen = io.StringIO()
    display._console = plain_console(file=screen, soft_wrap=True)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with display:
        display.start_source("a", 1000, 0)
        for completed in range(100, 600, 100):
            clock[0] += 2
            display.advance(10, 2_000_000, completed)
    lines = screen.getvalue().splitlines()
    assert lines == ["a: 30 documents, 1.0 MB/s, 30 %, 14 s left"]


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    display = ProgressDisplay()
    with display:
        display.start_source("a", 1000, 0)
        display.advance(10, 2_000_000, 500)
        assert display._bar is not None
        assert display._bar.tasks[0].percentage == 50
        assert "10 documents" in display._bar.tasks[0].fields["words"]
