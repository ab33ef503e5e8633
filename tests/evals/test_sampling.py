"""Choosing tokens, streaming text, and the command."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from evals.completions import HuggingFaceCompletion, OwnCompletion, Sampling
from pretrain.data.tokenizer import Tokenizer
from pretrain.inference.generate import choose, generate
from pretrain.inference.load import LoadedModel
from pretrain.model.build import build_model
from tests.helpers import processes
from tests.helpers.byte_tokenizer import Letters
from tests.helpers.small_model import VOCAB, settings
from tests.helpers.training_run import Run

LOGITS = torch.log(torch.tensor([0.05, 0.5, 0.15, 0.3]))


def drawn(count=4000, **options):
    generator = torch.Generator().manual_seed(0)
    found = [choose(LOGITS, 1.0, generator, **options) for _ in range(count)]
    return [found.count(i) / count for i in range(4)]


def test_tokens_are_drawn_as_likely_as_they_are():
    assert drawn() == pytest.approx([0.05, 0.5, 0.15, 0.3], abs=0.03)
    assert choose(LOGITS, 0.0, torch.Generator()) == 1
    cold = [choose(LOGITS, 0.05, torch.Generator().manual_seed(i)) for i in range(50)]
    assert cold == [1] * 50


def test_top_k_and_top_p_leave_out_the_unlikely():
    assert drawn(top_k=2) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    assert drawn(top_k=1) == [0, 1, 0, 0]
    # 0.5 + 0.3 is not 0.85 yet: the third is in, the fourth is not.
    assert drawn(top_p=0.85) == pytest.approx([0, 0.526, 0.158, 0.316], abs=0.03)
    assert drawn(top_p=0.4) == [0, 1, 0, 0]
    # After top_k: of 0.625 and 0.375 the first is enough.
    assert drawn(top_k=2, top_p=0.6) == [0, 1, 0, 0]


@pytest.mark.usefixtures("processes")
def test_a_seed_gives_the_same_text():
    model = build_model(settings(), VOCAB, seed=0)

    def ids(seed):
        return list(
            generate(
                model,
                [1, 2],
                max_tokens=12,
                temperature=1.0,
                seed=seed,
                vocab_size=VOCAB,
                top_k=20,
                top_p=0.9,
            )
        )

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)


def completion(monkeypatch, text, ended=False, **options):
    """One of a model that writes ``text``."""
    made = list(text.encode())
    monkeypatch.setattr("evals.completions.generate", lambda *_, **__: iter(made))
    nothing, letters = cast(Any, None), cast(Any, Letters())
    loaded = LoadedModel(nothing, letters, nothing, nothing, nothing)
    sampling = Sampling(len(made) + ended, **options)
    return OwnCompletion(loaded, loaded.prompt_ids("ab"), sampling)


def test_characters_come_whole(monkeypatch):
    found = completion(monkeypatch, "aé漢🙂b")
    assert list(found) == ["a", "é", "漢", "🙂", "b"]
    assert (found.reason, found.tokens) == ("length", 11)
    assert found.prompt_ids == [0, 97, 98]


def test_bytes_that_never_become_a_character_are_shown_in_the_end(monkeypatch):
    found = completion(monkeypatch, "ab")
    found._ids = iter([0xE6, 0xBC])
    assert "".join(found) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("stop", [["END"], ["nothing", "END", "x"], ["", "END"]])
def test_a_stop_string_ends_the_text_and_is_never_shown(monkeypatch, stop):
    found = completion(monkeypatch, "one ENtwo ENDthree", stop=stop)
    pieces = list(found)
    assert "".join(pieces) == "one ENtwo "
    assert not any(piece.endswith("E") for piece in pieces[:4]), "held back, it may be a beginning"
    assert found.reason == "stop string"
    assert found.tokens == len("one ENtwo END")


def test_what_was_held_back_comes_when_the_text_ends(monkeypatch):
    found = completion(monkeypatch, "one EN", ended=True, stop=["END"])
    assert "".join(found) == "one EN"
    assert found.reason == "end of document"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    run = Run(tmp_path_factory.mktemp("sampled"), corpus, "sampled")
    status, output = run.finish()
    assert status == 0, output
    return run


def sample(run, *words, stdin=b""):
    return processes.run("evals", "sample", run.directory, *words, text=stdin)


@pytest.mark.slow
def test_the_command_continues_a_text(trained):
    done = sample(trained, "--prompt", "def function_1", "--max-tokens", "20", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert text.startswith("def function_1")
    told = done.stderr
    assert "tokens/s, ended by" in told
    piped = sample(
        trained,
        "--prompt-file",
        "-",
        "--max-tokens",
        "20",
        "--temperature",
        "0",
        stdin=b"def function_1",
    )
    assert piped.stdout == text
    tokenizer = Tokenizer.load(trained.directory / "checkpoints" / "step-00000016")
    assert len(tokenizer.encode(text)) > 5


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small random Llama whose tokenizer has a form of conversations."""
    pytest.importorskip("transformers")
    from tests.helpers.small_llama import make_llama

    folder = make_llama(tmp_path_factory.mktemp("llama") / "hf", "chat")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


def command(name, source, *words, stdin=b""):
    return processes.run("evals", name, source, *words, text=stdin)


GREEDY = ("--max-tokens", "8", "--temperature", "0")


def test_a_model_of_transformers_has_stopped_when_its_text_is_left():
    """A thread still inside torch aborts the process where the interpreter ends."""
    ended = []

    def generate(tokens, streamer, stopping_criteria, **_):
        streamer.put(tokens[0])
        while not stopping_criteria[0]():
            streamer.put(torch.tensor([5]))
            time.sleep(0.01)
        time.sleep(0.2)
        ended.append(True)

    text = SimpleNamespace(stop_ids=frozenset())
    model = SimpleNamespace(text=text, model=SimpleNamespace(device="cpu", generate=generate))
    ids = cast(Any, HuggingFaceCompletion(cast(Any, model), [1], Sampling(max_tokens=8)).ids())
    assert next(ids) == 5
    ids.close()
    assert ended


@pytest.mark.slow
def test_models_of_transformers_are_sampled_like_imported_ones(llama, tmp_path):
    imported = processes.run("pretrain", "import", llama, tmp_path / "run")
    assert imported.returncode == 0, imported.stderr
    words = ("--prompt", "some text", *GREEDY)
    ours = command("sample", tmp_path / "run", *words)
    theirs = command("sample", f"hf:{llama}", *words)
    assert ours.returncode == theirs.returncode == 0, theirs.stderr
    assert theirs.stdout == ours.stdout and theirs.stdout.startswith("some text")
    one = command("sample", f"hf:{llama}", "--prompt", "some", "--max-tokens", "8", "--seed", "3")
    two = command("sample", f"hf:{llama}", "--prompt", "some", "--max-tokens", "8", "--seed", "3")
    assert one.stdout == two.stdout
    refused = command("sample", f"hf:{llama}", "--recurrences", "2")
    assert refused.returncode == 2
    assert "--recurrences is 2, but this option is only for checkpoints" in refused.stderr


@pytest.mark.slow
def test_a_model_with_roles_is_talked_to(llama, tmp_path):
    """Two turns of a chat are its template's text of both, to ours and to transformers' alike."""
    typed = b"hello\n/again\n/set temperature 0\n/set nothing\n/undo\n/undo\nmore\n/history\n"
    processes.run("pretrain", "import", llama, tmp_path / "run")
    options = ("--prompt", "be brief", *GREEDY)
    ours = command("chat", tmp_path / "run", *options, stdin=typed)
    theirs = command("chat", f"hf:{llama}", *options, stdin=typed)
    assert ours.returncode == theirs.returncode == 0, ours.stderr
    assert ours.stdout == theirs.stdout
    assert "the model answers what you type" in ours.stderr
    told = ours.stderr.splitlines()[1:]
    assert told == [
        "/set nothing: expected a name of temperature, top_k, top_p, max_tokens, seed, and a "
        "number",
        "there is no turn yet",
    ]
    drawn = command("chat", tmp_path / "run", "--max-tokens", "8", stdin=b"hello\n/again\n")
    _, one, another, _ = drawn.stdout.split("> ")
    assert one != another
    from pretrain.inference.load import load_model

    loaded = load_model(tmp_path / "run")
    assert loaded.imported is not None
    text = (
        "<|im_start|>system\nbe brief<|im_end|><|im_start|>user\nmore<|im_end|>"
        "<|im_start|>assistant\n"
    )
    ids = loaded.imported.encode(text, False)
    made = generate(
        loaded.model,
        ids,
        max_tokens=8,
        temperature=0,
        seed=0,
        vocab_size=loaded.candidates,
        stop_ids=loaded.stop_ids,
    )
    answer = loaded.decode([*ids, *made])[len(loaded.decode(ids)) :]
    assert f"> {answer}\n> > more\n{answer}\n" in ours.stdout


@pytest.mark.slow
def test_any_other_model_goes_on_with_the_text(trained):
    typed = b"def function_1\n(x):\n/reset\n/nothing\n"
    done = command("chat", trained.directory, "--prompt", "# a file\n", *GREEDY, stdin=typed)
    assert done.returncode == 0, done.stderr
    assert "continues the text that you type" in done.stderr
    assert done.stderr.splitlines()[-1] == "/nothing is no command; /help lists them"
    first, second = done.stdout.split("> ")[1:3]
    alone = sample(trained, "--prompt", "# a file\ndef function_1", *GREEDY).stdout
    assert alone == f"# a file\ndef function_1{first}"
    both = f"# a file\ndef function_1{first[:-1]}(x):"
    assert sample(trained, "--prompt", both, *GREEDY).stdout == f"{both}{second}"


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (["--prompt-file", "-"], b"ab\xff", "the standard input is not UTF-8 at byte 2"),
        (["--prompt-file", "none.txt"], b"", "none.txt: No such file"),
        (["--top-p", "1.5"], b"", "--top-p is 1.5, expected above 0 and at most 1"),
        (["--max-tokens", "0"], b"", "--max-tokens is 0, expected 1 or more"),
        (["--wavefront", "4"], b"", "--wavefront is 4, but is for sampling in parallel alone"),
        (["--published"], b"", "--published is given, but is for sampling in parallel alone"),
        (["--parallel", "--eps", "-1"], b"", "--eps is -1.0, expected 0 or more"),
    ],
)
def test_bad_input_is_one_sentence(words, stdin, message, tmp_path):
    run = SimpleNamespace(directory=tmp_path)
    done = sample(run, *words, stdin=stdin)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
