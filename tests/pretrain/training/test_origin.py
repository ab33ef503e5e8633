"""What made a number that is not finite is found, wherever it is planted; a file repeats it."""

from __future__ import annotations

import errno
import json
import math
import re
from typing import Any

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.config import ParallelConfig
from pretrain.model.build import build_model
from pretrain.nn.mixers import registry
from pretrain.parallel.processes import start_processes, stop_processes
from pretrain.run_directory import RunDirectory
from pretrain.training import replay
from pretrain.training.callbacks import Callback, origin
from pretrain.training.engine import Engine
from pretrain.training.origin import search
from pretrain.training.origin_text import describe_origin
from pretrain.training.trainer import Trainer
from tests.helpers import origin_worker
from tests.helpers.origin_worker import LAYOUTS, TOKEN, plant
from tests.helpers.parallel_worker import settings
from tests.helpers.processes import run_on
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import OPTIMIZER, batches
from tests.helpers.spoiled_run import Spoil
from tests.helpers.training_run import QUICK, Run

pytestmark = [pytest.mark.usefixtures("processes")]


KINDS = ((math.nan, "NaN"), (math.inf, "infinity"))


def engine_of(pattern, checkpointing="none", **changes):
    config = settings(pattern, **changes)
    model = build_model(config, VOCAB, seed=0, activation_checkpointing=checkpointing)
    return Engine(model, OPTIMIZER, ParallelConfig())


def found_in(engine):
    local = batches(0, rows=4, micro_batch_size=2)
    found = search(engine, local, 0, 0)
    batch = None if found.event is None else local[found.event.micro_batch]
    return found, describe_origin(found, engine.parts[0].model_config, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", registry())
def test_every_mixer_is_named(name):
    engine = engine_of(f"attn {name}")
    for value, word in KINDS:
        handles = plant(engine, "blocks.1.mixer", value)
        found, sentence = found_in(engine)
        assert found.event is not None and not found.finite
        assert (found.event.module, found.event.token) == ("blocks.1.mixer", TOKEN)
        assert f"the first {word} is made in block 1 ({name}), mixer, on rank 0" in sentence
        for handle in handles:
            handle.remove()
    assert found_in(engine)[0].finite


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
@pytest.mark.parametrize(
    ("module", "backward", "words"),
    [
        ("embedding", False, "is made in the embedding,"),
        ("final_norm", False, "is made in the final norm,"),
        ("blocks.1.mixer.o_proj", False, "is made in block 1 (attn), mixer.o_proj,"),
        ("blocks.0.mlp", False, "is made in block 0 (gdn), mlp,"),
        ("blocks.0.mlp_norm", True, "the backward pass of block 0 (gdn), mlp_norm,"),
        ("blocks.1.mixer", True, "the backward pass of block 1 (attn), mixer,"),
    ],
)
def test_operations_are_named(module, backward, words, checkpointing):
    engine = engine_of("gdn attn gdn", checkpointing)
    for value, word in KINDS:
        handles = plant(engine, module, value, backward=backward)
        _, sentence = found_in(engine)
        assert words in sentence and f"the first {word} is" in sentence
        for handle in handles:
            handle.remove()
    assert re.search(r"in micro-batch \d, document \d+, token \d+$", sentence)


@pytest.mark.parametrize(("value", "word"), KINDS)
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        ("blocks.1.mixer.q_proj.weight", "block 1 (attn), mixer.q_proj, whose weight blocks.1"),
        ("head.weight", "the head, whose weight head.weight is not finite"),
        ("embedding.weight", "the embedding, whose weight embedding.weight is not finite"),
    ],
)
def test_weights_that_are_not_finite_are_named(weight, words, value, word):
    engine = engine_of("gdn attn gdn", tie_embeddings=False)
    parameters = dict(engine.parts[0].named_parameters())
    with torch.no_grad():
        parameters[weight][7] = value
    assert words in found_in(engine)[1]


@pytest.mark.parametrize(("value", "word"), KINDS)
def test_a_gradient_is_named(value, word):
    engine = engine_of("gdn attn gdn")
    weight = engine.parts[0].get_parameter("blocks.1.mixer.k_proj.weight")
    weight.register_hook(lambda g: g + value)
    found, sentence = found_in(engine)
    assert found.event is not None and found.event.parameter
    assert (
        f"the first {word} is in the gradient of blocks.1.mixer.k_proj.weight, made by the "
        "backward pass of block 1 (attn), mixer.k_proj, on rank 0"
    ) in sentence


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("origin") / "found.json"
    run_on(2, origin_worker.__name__, file)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_process_is_named_and_training_goes_on_unchanged(layout, two_processes):
    results = two_processes[layout]
    planted = (
        ("forward", "blocks.2.mixer_norm"),
        ("infinity", "blocks.2.mixer_norm"),
        ("backward", "blocks.2.mlp"),
    )
    for kind, module in planted:
        event = results[kind]["event"]
        assert (event["module"], event["rank"]) == (module, 1)
        assert event["backward"] == (kind == "backward")
    assert results["none"]["finite"]
    assert results["after"] == results["without"]


class SpoilWeight(Callback):
    """Makes a weight infinite before a step."""

    def before_step(self):
        if self.trainer.state.step == 2:
            weight = self.trainer.engine.parts[0].get_parameter("blocks.1.mixer.q_proj.weight")
            with torch.no_grad():
                weight[3, 5] = math.inf


SKIP = (*QUICK, "train.nonfinite=skip", "model.dropout=0.1")


def log_of(run):
    return RunDirectory(run.directory).log_file.read_text()


def test_a_skipped_step_is_looked_at_and_changes_nothing(tmp_path, corpus):
    """Training goes on as it does where nobody looks."""
    found = []
    for look in ("true", "false"):
        run = Run(tmp_path, corpus, f"look-{look}", steps=5)
        overrides = [*SKIP, f"train.find_origin={look}"]
        Trainer(run.config, overrides=overrides, callbacks=[Spoil(3, "blocks.1.mixer")]).fit()
        found.append(run.losses)
    assert found[0] == found[1]
    (line,) = (
        x
        for x in log_of(Run(tmp_path, corpus, "look-true", steps=5)).splitlines()
        if "made in" in x
    )
    assert "step 3: loss nan" in line
    assert "the first NaN is made in block 1 (attn), mixer, on rank 0" in line
    assert re.search(
        r"document \d+, token \d+ \(token [\d,]+ of \w+@\w+\); python -m pretrain", line
    )


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path, corpus, monkeypatch):
    def refuses(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(origin, "write_replay", refuses)
    run = Run(tmp_path, corpus, "full", steps=3)
    spoil = Spoil(2, "blocks.0.mlp")
    assert Trainer(run.config, overrides=SKIP, callbacks=[spoil]).fit().status == "completed"
    (line,) = [x for x in log_of(run).splitlines() if "no file repeats it" in x]
    assert re.search(r"on rank 0 .*; cannot write .*step-2[.]pt: .*, so no file repeats it$", line)


def test_a_machine_is_blamed_for_what_does_not_come_again(tmp_path, corpus):
    run = Run(tmp_path, corpus, "machine", steps=3)
    spoil = Spoil(2, "blocks.0.mlp", once=True)
    Trainer(run.config, overrides=SKIP, callbacks=[spoil]).fit()
    assert "run again, the same step is finite: arithmetic is not to blame" in log_of(run)
    assert "perhaps the machine of rank 0 (" in log_of(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("again", "the first NaN is made in block 1 (attn), mixer, on rank 1 ("),
        ("once", "arithmetic is not to blame, but perhaps the machine of rank 1 ("),
    ],
)
def test_one_of_two_processes_is_named(kind, words, tmp_path, corpus):
    trained = Run(tmp_path, corpus, kind, steps=4)
    run_on(2, "tests.helpers.spoiled_run", kind, trained.config, *SKIP, "logging.blocks=2")
    assert words in log_of(trained)
    assert RunDirectory(trained.directory).replay_file(3).is_file()
    assert max(row.get("skipped", 0) for row in trained.metrics) == 1


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_repeats_the_step(whole, tmp_path, corpus, monkeypatch, capsys):
    if not whole:
        monkeypatch.setattr(replay, "WHOLE_BYTES", 0)
    run = Run(tmp_path, corpus, "replayed", steps=4)
    assert Trainer(run.config, overrides=QUICK, callbacks=[SpoilWeight()]).fit().exit_status == 3
    file = RunDirectory(run.directory).replay_file(3)
    assert f"python -m pretrain replay {file} repeats it" in log_of(run)
    stop_processes()
    capsys.readouterr()
    status = replay.main([str(file)])
    output = capsys.readouterr().out
    start_processes()
    made = "the first infinity is made in block 1 (attn), mixer.q_proj, whose weight blocks.1.mixer"
    first, *_, last = output.splitlines()
    assert first.startswith("written: step 3: loss nan") and made in first
    if whole:
        assert status == 3 and made in last
    else:  # the weights of the checkpoint before are finite
        assert status == 0 and "0 steps before step 3" in output
        assert "and every gradient is finite" in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file, expected a file of runs/NAME/replay"),
        (b"no", "cannot be read"),
        ({"format": 9}, "has the format 9, expected 1"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    file = tmp_path / "step-1.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(UserError, match=message):
        replay.read_replay(file)
