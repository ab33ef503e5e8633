"""RWKV's channel mixing against its equations, and as an MLP whose state a block carries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from pretrain.data.sequences import Sequences
from pretrain.inference.generate import generate
from pretrain.inference.score import StateScorer
from pretrain.model.block_states import MLP_SHIFT
from pretrain.model.build import build_model
from pretrain.model.counts import count_model
from pretrain.nn.channel_mixing import ChannelMixing
from pretrain.nn.mixers import LayerContext
from pretrain.nn.parameters import fill_parameters
from pretrain.parallel.context import ParallelContext
from pretrain.planner.hardware import load_hardware
from pretrain.planner.memory import Memory
from pretrain.planner.software import Software
from tests.helpers.channel_mixing import CHANNELS, with_output
from tests.helpers.exported_models import exported
from tests.helpers.relative_error import relative_error
from tests.helpers.small_mixers import SMALL
from tests.helpers.small_model import VOCAB

pytestmark = pytest.mark.usefixtures("processes")
TOKENS = torch.arange(40)[None] * 7 % VOCAB
LENGTHS = [13, 1, 26]
EXPERTS = {"num_experts": 4, "intermediate_size": 16, "first_dense": 2}  # the last block's alone
LOOP = {"prelude": 1, "times": 2}


def config_of(pattern: str = "rwkv7 gdn attn", **changes: Any) -> ModelConfig:
    mixers = {name: SMALL[name][0] for name in ("rwkv7", "gdn", "attn") if name in pattern}
    values = {"hidden_size": 24, "pattern": pattern, "mixers": mixers, **CHANNELS, **changes}
    return build_config(ModelConfig, values, "test")


def model_of(
    checkpointing: str = "none", dtype: torch.dtype = torch.float64, **changes: Any
) -> Any:
    config = config_of(**changes)
    return with_output(
        build_model(config, VOCAB, seed=1, dtype=dtype, activation_checkpointing=checkpointing)
    )


def layer_of(index: int = 1, count: int = 3) -> ChannelMixing:
    context = LayerContext(24, 0.3, 0.3, ParallelContext(torch.float64), index, count)
    layer = ChannelMixing(48, context)
    fill_parameters(layer, seed=1)
    return layer


def test_outputs_and_gradients_are_those_of_the_equations():
    layer = with_output(torch.nn.Sequential(layer_of()))[0]
    x = torch.randn(40, 1, 24, dtype=torch.float64, requires_grad=True)
    found, last = layer(x, sequences=Sequences.from_lengths(LENGTHS))
    expected = []
    for part in x[:, 0].split(LENGTHS):
        for t, now in enumerate(part):
            before = part[t - 1] if t else torch.zeros_like(now)
            mixed = now + layer.mix * (before - now)
            inner = torch.relu(layer.up_proj.weight @ mixed) ** 2
            expected.append(layer.down_proj.weight @ inner)
    assert relative_error(found[:, 0], torch.stack(expected)) < 1e-12
    assert last is not None
    assert torch.equal(last[:, 0], x[[12, 13, 39], 0])
    leaves = [x, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(found.pow(3).sum(), leaves),
        torch.autograd.grad(torch.stack(expected).pow(3).sum(), leaves),
        strict=True,
    ):
        assert relative_error(one, other) < 1e-12


def test_it_starts_as_published():
    for index in range(3):
        layer = layer_of(index)
        channels = torch.arange(24, dtype=torch.float32) / 24
        expected = 1 - channels ** ((1 - index / 3) ** 4)
        assert torch.equal(layer.mix, expected.double())
        square = layer.up_proj.weight.T @ layer.up_proj.weight
        assert torch.allclose(square, torch.eye(24, dtype=torch.float64), atol=1e-5)
        assert not layer.down_proj.weight.any()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses = model(TOKENS, TOKENS.roll(-1, 1), sequences=Sequences.from_lengths([30, 10]))
    losses.square().sum().backward()
    return {"losses": losses, **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("how", ["block", "selective", "segments"])
def test_checkpointing_and_segments_change_nothing(how):
    expected = gradients(model_of().train())
    model = model_of("none" if how == "segments" else how).train()
    if how == "segments":
        model.segment_tokens = 9
    found = gradients(model)
    assert found["blocks.0.mlp.mix"].abs().max() > 1e-3
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-10, name


def test_documents_stay_apart_bit_for_bit():
    model = model_of()
    changed = TOKENS.clone()
    changed[:, :14] = 5
    sequences = Sequences.from_lengths(LENGTHS)
    one, other = (model(t, sequences=sequences) for t in (TOKENS, changed))
    assert torch.equal(one[:, 14:], other[:, 14:])
    assert not torch.equal(one[:, 13], other[:, 13])


@pytest.mark.parametrize("changes", [{}, {"recursion": LOOP}, {"moe": EXPERTS}])
def test_token_by_token_equals_all_at_once(changes):
    model = model_of(**changes).eval()
    states, logits = None, []
    for token in TOKENS[:, :9].split(1, 1):
        y, states = model.forward_with_state(token, states)
        logits.append(y)
    assert relative_error(torch.cat(logits, 1), model(TOKENS[:, :9])) < 1e-10
    # Rows are picked out and joined with their states, keys of attention and all.
    rows = torch.randint(VOCAB, (3, 5))
    order = torch.tensor([2, 0])
    _, states = model.forward_with_state(rows, None)
    following = torch.randint(VOCAB, (2, 3))
    found, _ = model.forward_with_state(following, model.select_states(states, order))
    whole = model(torch.cat([rows[order], following], 1))
    assert relative_error(found, whole[:, 5:]) < 1e-10


def test_counts_are_those_of_the_model():
    config, model = config_of(), model_of(dtype=torch.float32)
    counts = count_model(config, VOCAB, 40)
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    relu = count_model(config_of(mlp={"kind": "relu", "ratio": 2}), VOCAB, 40)
    assert counts.flops_per_token == relu.flops_per_token
    assert counts.state_bytes == relu.state_bytes + 3 * 2 * 24
    layer, x = model.blocks[0].mlp, torch.randn(40, 1, 24)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 40 * 2 * 2 * 24 * 48
    state = model.blocks[2].states.init_state(3)
    assert state[MLP_SHIFT].shape == (3, 1, 24)


def test_plans_and_scores_count_its_state_too():
    model = model_of(dtype=torch.bfloat16, pattern="rwkv7 gdn")
    states = [block.states.init_state(3) for block in model.blocks]
    held = sum(value.nbytes for state in states for value in state.values())
    train = TrainConfig(steps=1, seq_len=40, carry_state=True)
    run = RunConfig("test", config_of("rwkv7 gdn"), train=train)
    memory = Memory(run, VOCAB, load_hardware("cpu"), Software())
    assert memory.carried(ParallelConfig(), 3) == held
    # A row's state is where it begins, and until the end of a step where it ends.
    assert memory.carried(ParallelConfig(context=2, micro_batch_size=1), 3) == held
    assert memory.carried(ParallelConfig(context=2, micro_batch_size=2), 6) == held
    assert memory.carried(ParallelConfig(context=2, micro_batch_size=3), 3) == held * 2 / 3
    assert 3 * StateScorer(model, 9)._state_bytes(40) == held


def test_an_export_generates_with_its_cache_what_the_model_does(tmp_path):
    model = model_of(dtype=torch.float32).eval()
    theirs, _ = exported(model, tmp_path, VOCAB)
    prompt = [3, 1, 4, 1, 5]
    ours = generate(model, prompt, max_tokens=20, temperature=0, seed=0, vocab_size=VOCAB)
    found = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert found[0].tolist() == [*prompt, *ours]
