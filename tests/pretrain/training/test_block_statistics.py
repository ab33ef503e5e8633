"""Statistics by block: right under every layout, and training is bit for bit what it was."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.common.config_loader import ConfigError
from pretrain.config import LoggingConfig, ParallelConfig, load_run_config
from pretrain.nn.mixers import registry
from pretrain.run_directory import RunDirectory, find_checkpoint
from pretrain.training.block_statistics import BlockStatistics
from pretrain.training.log import RunLog
from pretrain.training.metrics import LayerMetrics
from pretrain.training.trainer import Trainer
from tests.helpers import blocks_worker
from tests.helpers.blocks_worker import CASES, COMPARED
from tests.helpers.parallel_worker import step_of
from tests.helpers.processes import run_on
from tests.helpers.small_training import batches
from tests.helpers.training_run import QUICK, Run, untimed

pytestmark = [pytest.mark.usefixtures("processes")]

# Of what a solver left over, and of how far it went.
ROUNDED = ("newton_residual_max", "newton_iterations_max", "newton_fallbacks")


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("blocks") / "found.json"
    run_on(4, blocks_worker.__name__, file)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@cache
def one_process(model):
    return blocks_worker.watch(model, ParallelConfig())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_layout_finds_what_one_process_finds(name, four_processes):
    expected, found = one_process(CASES[name][0])["rows"], four_processes[name]["rows"]
    assert [row["block"] for row in found] == [row["block"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert sorted(row) == sorted(wanted)
        for key, value in wanted.items():
            if isinstance(value, str):
                assert row[key] == value
            elif key not in ROUNDED:
                assert np.allclose(row[key], value, rtol=2e-3 if "update" in key else 1e-4), (
                    wanted["block"],
                    key,
                    row[key],
                    value,
                )


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_layouts_train_bit_for_bit_the_same(name, four_processes):
    """Losses and gradient norms of the watched step, and of the next one."""
    assert four_processes[name]["steps"] == four_processes[name]["without"]


@pytest.mark.parametrize(
    ("checkpointing", "mixers"),
    [
        ("block", "gdn attn para_gru"),
        *(
            pytest.param(x, "rat swa para_lstm lstm s4 tcnca", marks=pytest.mark.slow)
            for x in ("none", "selective", "block")
        ),
    ],
)
def test_training_is_bit_for_bit_the_same(checkpointing, mixers, tmp_path, corpus):
    """Also the metrics of layers, which both logs have."""
    found = []
    for every in (0, 2):
        run = Run(tmp_path, corpus, f"run-{every}", steps=4)
        pattern = f"model.pattern={mixers}"
        kept = f"train.activation_checkpointing={checkpointing}"
        overrides = [*QUICK, pattern, kept, f"logging.blocks={every}", "checkpoint.every=4"]
        assert Trainer(run.config, overrides=overrides).fit().status == "completed"
        files = sorted(find_checkpoint(run.directory).glob("*.distcp"))
        found.append(([*map(untimed, run.metrics)], [file.read_bytes() for file in files]))
    assert found[0][1] and found[0] == found[1]
    rows = RunDirectory(run.directory).read_blocks()
    assert [row["step"] for row in rows] == [2, 4]
    blocks = ["embedding", *range(len(mixers.split())), "head"]
    assert [block["block"] for block in rows[0]["blocks"]] == blocks


def _watched(pattern, rows=4, checkpointing="none", **changes):
    """The rows of a step by block, the model as it was before, and as it is after it."""
    before = blocks_worker.model_of(pattern, **changes)
    engine = blocks_worker.engine_of(pattern, checkpointing, **changes)
    statistics = BlockStatistics(engine, LayerMetrics())
    statistics.open()
    step_of(engine, 0, rows)
    statistics.close()
    found = {row["block"]: row for row in statistics.rows()}
    return found, before, engine.parts[0]


def _rms(tensors):
    return float(torch.cat([t.detach().flatten() for t in tensors]).double().square().mean().sqrt())


def test_numbers_are_those_of_the_definitions():
    found, before, after = _watched("gdn attn gdn", tie_embeddings=False)
    kept: dict[int, list[Any]] = {}
    count = 0.0
    for number in range(3):
        before.blocks[number].register_forward_hook(
            lambda _, __, output, number=number: kept.setdefault(number, []).append(output)
        )
    for batch in batches(0, rows=4, micro_batch_size=1):
        losses = before(batch.tokens, batch.targets, sequences=batch.sequences)
        (losses * batch.loss_mask).sum().backward()
        count += float(batch.loss_mask.sum())
    for number in range(3):
        row, weights = found[number], dict(before.blocks[number].named_parameters())
        updated = dict(after.blocks[number].named_parameters())
        assert np.isclose(row["activation_rms"], _rms(x for x, _ in kept[number]), rtol=1e-5)
        assert np.isclose(row["weight_rms"], _rms(weights.values()), rtol=1e-6)
        gradients = [w.grad / count for w in weights.values()]
        assert np.isclose(row["gradient_rms"], _rms(gradients), rtol=1e-4)
        largest = max(float(g.abs().max()) for g in gradients)
        assert np.isclose(row["gradient_max"], largest, rtol=1e-4)
        moved = [updated[name] - w for name, w in weights.items()]
        assert np.isclose(row["update_rms"], _rms(moved), rtol=1e-4)
        mixer = [w for name, w in weights.items() if name.startswith("mixer.")]
        assert np.isclose(row["mixer_weight_rms"], _rms(mixer), rtol=1e-6)
        assert row["update_ratio"] == row["update_rms"] / row["weight_rms"]
    states = torch.cat([state["recurrent"] for _, state in kept[0]]).detach().double()
    norm = float(states.square().sum((1, 2, 3)).mean().sqrt())
    assert np.isclose(found[0]["state_norm"], norm, rtol=1e-5)
    values = torch.linalg.svdvals(states)
    ranks = values.square().sum(-1).square() / values.pow(4).sum(-1)
    assert np.isclose(found[0]["state_rank"], float(ranks.mean()), rtol=1e-4)
    assert 1 <= found[0]["state_rank"] <= 4
    assert found[0]["horizon"] > 0 and 0 < found[0]["beta_mean"] < 1


def test_recomputed_passes_are_counted_once():
    expected, *_ = _watched("gdn attn para_gru")
    for checkpointing in ("block", "selective"):
        found, *_ = _watched("gdn attn para_gru", checkpointing=checkpointing)
        assert found == expected


def test_numbers_that_are_not_finite_are_a_share():
    engine = blocks_worker.engine_of("gdn attn")
    with torch.no_grad():
        engine.parts[0].get_parameter("blocks.1.mlp.up_proj.weight")[0, :2] = math.nan
    statistics = BlockStatistics(engine, LayerMetrics())
    statistics.open()
    step_of(engine, 0, 4)
    statistics.close()
    row = statistics.rows()[2]
    share = 2 / sum(p.numel() for p in engine.parts[0].blocks[1].parameters())
    assert np.isclose(row["weight_nonfinite"], share) and row["gradient_nonfinite"] == 1
    assert np.isfinite(row["weight_rms"]) and row["gradient_rms"] is None


# What each mixer shows of itself, beside sizes.
_OWN = {
    "horizon": "aaren comba delta_product gdn gdn2 gla gru hgrn hgrn2 kda lightnet lstm m2rnn "
    "mamba mamba2 mamba3 memora mesa mlstm mlstm_v1 moneta para_gru para_lstm plstm quasi_lstm "
    "retnet rwkv7 s4 s4d slstm yaad",
    "logit_max": "aaren attn lightnet rat sliced_attn swa tcnca",
    "state_norm": "aaren comba delta_product deltanet elman gdn gdn2 gla gru hgrn hgrn2 jrt kda "
    "lightnet linear_attn lstm m2rnn mamba mamba2 mamba3 memora mesa mlstm mlstm_v1 moneta "
    "para_gru para_lstm plstm quasi_lstm retnet rwkv7 s4 s4d slstm yaad",
    "state_rank": "comba delta_product deltanet gdn gdn2 gla hgrn2 jrt kda lightnet linear_attn "
    "m2rnn mamba2 mamba3 memora mesa mlstm mlstm_v1 moneta plstm retnet rwkv7 yaad",
    "newton_residual_max": "para_gru para_lstm",
    "beta_mean": "comba deltanet delta_product gdn kda mesa",
    "rate_mean": "memora moneta yaad",
    "input_mean": "lstm",
    "reset_mean": "gru",
    "output_mean": "lstm slstm",
    "average_mean": "rat",
    "update_mean": "tcnca",
    "erase_mean": "gdn2",
    "source_mean": "plstm",
    "step_mean": "mamba3",
}
# Why a mixer has no horizon.
_NOTHING_DECAYS = {
    "attn": "all tokens so far are seen",
    "swa": "the window's tokens are seen, all alike",
    "sliced_attn": "the slice's tokens are seen, all alike",
    "rat": "averages decay inside chunks, whose ends are all seen",
    "tcnca": "the chunk's tokens are seen, and those under convolutions",
    "linear_attn": "a sum without decay",
    "jrt": "a sum without decay",
    "deltanet": "keys are overwritten; nothing else fades",
    "elman": "no gate; its matrix mixes the whole state",
}
# Why one has no state that is rewritten at every token.
_NOTHING_REWRITTEN = {
    "attn": "keys and values of tokens",
    "swa": "keys and values of tokens",
    "sliced_attn": "keys and values of tokens",
    "rat": "keys and values of chunks",
    "tcnca": "inputs of convolutions, and of the chunk",
}


def test_every_mixer_says_what_it_has():
    """A new one is asked what its memory's horizon and its state are."""
    assert set(_OWN["horizon"].split()) | set(_NOTHING_DECAYS) == set(registry())
    assert set(_OWN["state_norm"].split()) | set(_NOTHING_REWRITTEN) == set(registry())


@pytest.mark.slow
@pytest.mark.parametrize("name", registry())
def test_every_mixer_shows_what_it_has(name):
    found, *_ = _watched(name, rows=2)
    row = found[0]
    assert {key for key in _OWN if key in row} == {
        k for k, who in _OWN.items() if name in who.split()
    }
    assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))
    assert "horizon" not in row or row["horizon"] > 0


def test_weights_in_files_are_refused(tmp_path, corpus):
    run = Run(tmp_path, corpus, "run")
    settings = ["offload=nvme", "offload_path=/tmp", "zero_backend=deepspeed", "zero_stage=3"]
    overrides = ["logging.blocks=5", *(f"parallel.{setting}" for setting in settings)]
    with pytest.raises(ConfigError, match=r"is 5 with parallel[.]offload nvme"):
        load_run_config(run.config, overrides)


class _Tracker:
    def __init__(self):
        self.found = []

    def record(self, values):
        self.found.append(values)

    def rewind(self, step):
        pass

    def close(self):
        pass


def test_lines_of_steps_that_come_again_are_dropped(tmp_path):
    directory, rows = RunDirectory(tmp_path), [{"block": 3, "mixer": "gdn", "horizon": np.inf}]
    directory.metrics_file.touch()
    for step, kept in ((0, []), (10, [10])):
        log = RunLog(directory, LoggingConfig(blocks=10), active=True, num_steps=40, step=step)
        log._trackers = [tracker := _Tracker()]
        assert [row["step"] for row in directory.read_blocks()] == kept
        for number in (10, 20, 30):
            if number > step:
                log.blocks(number, 32 * number, [rows[0] | {"weight_rms": 0.5}])
        assert tracker.found[-1] == {"step": 30, "blocks/3/weight_rms": 0.5}
        log.rewind(20)
        log.blocks(30, 960, rows)
        log.close()
    assert [row["step"] for row in directory.read_blocks()] == [10, 20, 30]
    assert directory.read_blocks()[-1]["blocks"] == [{**rows[0], "horizon": None}]
