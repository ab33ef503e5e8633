"""Each mixer of the registry in a whole model: engine, checkpoint round trip, activation
checkpointing, bf16."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import pretrain
from pretrain.checkpoint.state import check_files, check_same_model, load_checkpoint, read_state
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.common.config_loader import build_config
from pretrain.config import CheckpointConfig, ModelConfig, RunConfig
from pretrain.model.build import build_model
from pretrain.nn.mixers import registry
from pretrain.training.engine import Engine
from tests.helpers.relative_error import relative_error
from tests.helpers.small_mixers import SMALL
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import OPTIMIZER, STATE, batches

pytestmark = pytest.mark.usefixtures("processes")


def settings(name, **changes):
    values = {
        "hidden_size": 24,
        "pattern": f"2*{name}",
        "mixers": {name: SMALL.get(name, [{}])[0]},
        "mlp": {"ratio": 2},
        "depth_scaled_init": True,
        **changes,
    }
    return build_config(ModelConfig, values, "test")


def make(name, dtype=torch.float32, checkpointing="none", **changes):
    return build_model(
        settings(name, **changes),
        VOCAB,
        seed=0,
        dtype=dtype,
        activation_checkpointing=checkpointing,
    )


@pytest.mark.parametrize("name", registry())
def test_training_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
    engine = Engine(make(name), OPTIMIZER)
    first = [engine.train_step(batches(0), 1e-2) for _ in range(2)]
    assert first[1].loss < first[0].loss
    state = dataclasses.replace(STATE, model=dataclasses.asdict(settings(name)))
    config = RunConfig("test", settings(name), checkpoint=CheckpointConfig())
    path = save_checkpoint(tmp_path, engine, config, state)
    expected = engine.train_step(batches(2), 1e-2)
    other = Engine(make(name), OPTIMIZER)
    check_files(path)
    check_same_model(read_state(path), settings(name), VOCAB, path)
    load_checkpoint(path, other)
    assert other.train_step(batches(2), 1e-2) == expected
    for a, b in zip(engine.parts[0].parameters(), other.parts[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", registry())
def test_activation_checkpointing_and_bf16(name):
    batch = batches(0)[0]
    found = []
    for dtype, checkpointing in (
        (torch.float32, "none"),
        (torch.float32, "block"),
        (torch.bfloat16, "block"),
    ):
        model = make(name, dtype, checkpointing)
        loss = model(batch.tokens, batch.targets, sequences=batch.sequences).mean()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        found.append([loss, *(p.grad for p in model.parameters())])
    for plain, saving in zip(*found[:2], strict=True):
        assert torch.equal(plain, saving)
    assert found[2][0].item() == pytest.approx(found[0][0].item(), rel=1e-2)
    wide, narrow = (torch.cat([g.float().flatten() for g in f[1:]]) for f in (found[0], found[2]))
    assert relative_error(narrow, wide) < 0.1


@pytest.mark.parametrize("name", registry())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_checkpointing_changes_no_bit(name, dtype):
    batch, found = batches(0)[0], []
    changes = {"block_norm": "sandwich", "recursion": {"times": 2}}
    for checkpointing in ("none", "selective"):
        model = make(name, dtype, checkpointing, **changes)
        loss = model(batch.tokens, batch.targets, sequences=batch.sequences).mean()
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    for plain, saving in zip(*found, strict=True):
        assert torch.equal(plain, saving)


@pytest.mark.parametrize("name", registry())
def test_a_whole_layer_is_saved_and_loaded(name, tmp_path):
    layer = pretrain.mixer(name, hidden_size=24, **SMALL.get(name, [{}])[0])
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    x = torch.randn(2, 6, 24)
    assert torch.equal(loaded(x)[0], layer(x)[0])


@pytest.mark.parametrize("name", registry())
def test_a_layer_runs_within_autocast(name):
    layer = pretrain.mixer(name, hidden_size=24, std=0.2, **SMALL.get(name, [{}])[0])
    x = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(0))
    weights = [p for p in layer.parameters() if p.requires_grad]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, _ = layer(x)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), weights)))
    assert found[1][0].dtype == torch.bfloat16
    expected, within = (torch.cat([t.float().flatten() for t in each]) for each in found)
    assert relative_error(within, expected) < 0.15
