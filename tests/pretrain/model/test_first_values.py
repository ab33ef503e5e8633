"""What the first layer of a kind hands to the later ones, in one process and on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.common.config_loader import ConfigError
from pretrain.data.sequences import Sequences
from pretrain.model.build import build_model
from pretrain.model.counts import count_model
from pretrain.model.shared import FirstValuesOnTheWay
from pretrain.parallel.context import ParallelContext
from tests.helpers import first_values_worker
from tests.helpers.channel_mixing import CHANNELS
from tests.helpers.first_values_worker import ALONE, LOOPED, known, settings, step
from tests.helpers.processes import run_on
from tests.helpers.relative_error import relative_error
from tests.helpers.small_model import VOCAB

pytestmark = pytest.mark.usefixtures("processes")
TOKENS = torch.arange(40)[None] * 7 % VOCAB


def model_of(checkpointing: str = "none", **changes: Any) -> Any:
    with known():
        return build_model(
            settings(**changes),
            VOCAB,
            seed=1,
            dtype=torch.float64,
            activation_checkpointing=checkpointing,
        )


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses = model(TOKENS, TOKENS.roll(-1, 1))
    losses.square().sum().backward()
    return {"losses": losses, **{name: p.grad.clone() for name, p in model.named_parameters()}}


def test_later_layers_take_the_first_ones_values_with_gradients():
    """Against the model written out: each block on the residual stream, v of block 1 kept."""
    model = model_of()
    x = model.embedding(TOKENS)
    first: dict[str, torch.Tensor] = {}
    for block in model.blocks:
        options = {} if block.kind == "attn" else {"first": first}
        x = x + block.mixer(block.mixer_norm(x), **options)[0]
        x = x + block.mlp(block.mlp_norm(x))
    expected = model._losses(x, TOKENS.roll(-1, 1).t().contiguous()).t()
    found = model(TOKENS, TOKENS.roll(-1, 1))
    assert torch.equal(found, expected)
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        assert relative_error(one, other) < 1e-12
    with torch.no_grad():  # and they matter
        model.blocks[1].mixer.v_proj.weight.mul_(1.5)
        model.blocks[1].mixer.o_proj.weight.zero_()
    assert not torch.equal(model(TOKENS), model_of()(TOKENS))


@pytest.mark.parametrize("changes", [{}, LOOPED])
@pytest.mark.parametrize("how", ["block", "selective", "segments"])
def test_checkpointing_and_segments_change_nothing(how, changes):
    model = model_of(**changes).train()
    expected = gradients(model)
    if how != "segments":
        model = model_of(how, **changes).train()
    elif model.recursion is None:  # else segments are refused
        model.segment_tokens = 9
    found = gradients(model)
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-10, name


def test_documents_stay_apart():
    model, lengths = model_of(), [13, 1, 26]
    packed = model(TOKENS, sequences=Sequences.from_lengths(lengths))
    alone = torch.cat([model(part) for part in TOKENS.split(lengths, 1)], 1)
    assert relative_error(packed, alone) < 1e-10


def test_token_by_token_equals_all_at_once():
    model = model_of().eval()
    states, logits = None, []
    for token in TOKENS[:, :9].split(1, 1):
        y, states = model.forward_with_state(token, states)
        logits.append(y)
    assert relative_error(torch.cat(logits, 1), model(TOKENS[:, :9])) < 1e-10


def test_counts_know_that_later_layers_have_more():
    with known():
        config = settings()
        counted = count_model(config, VOCAB, 8).parameters
    assert counted == sum(p.numel() for p in model_of().parameters())


@pytest.mark.parametrize("sequence", [False, True])
def test_values_go_from_stage_to_stage_beside_activations(sequence):
    with known():
        config = settings()
    context = ParallelContext(torch.float64, tensor_size=2, sequence_parallel=sequence)
    on_the_way = FirstValuesOnTheWay(config, context)
    x = torch.randn(6 // (1 + sequence), 2, 24, dtype=torch.float64)
    v = torch.randn(6, 2, 12, dtype=torch.float64)
    sent = on_the_way.pack(x, {"handing": {"v": v}})
    assert sent.shape == (len(x), 2, 24 + on_the_way.width)
    assert on_the_way.width == (24 if sequence else 12)
    found, firsts = on_the_way.unpack(sent)
    assert torch.equal(found, x)
    assert torch.equal(firsts["handing"]["v"], v)
    _, nothing = on_the_way.unpack(on_the_way.pack(x, {}))
    assert not nothing["handing"]["v"].any()


def test_tokens_that_halt_cannot_take_values_of_the_loop_behind_it():
    halting = {"prelude": 1, "coda": 1, "times": 2, "halting": True}
    with known():
        settings("handing attn handing", recursion=halting)
        with pytest.raises(ConfigError, match=r"halting is true, but handing blocks behind"):
            settings("attn 2*handing", recursion=halting)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("first_values") / "found.pt"
    run_on(2, first_values_worker.__name__, path)
    found: dict[str, Any] = torch.load(path)
    return found


def compare(processes: Any, expected: Any, tensor_size: int) -> None:
    """Compare losses in float64, and gradients, which are summed in float32."""
    loss, gradients = expected
    assert sum(part for part, _ in processes) / tensor_size == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients.items():
        parts = [found[name] for _, found in processes if name in found]
        axes = [i for i, size in enumerate(gradient.shape) if parts[0].shape[i] != size]
        whole = torch.cat(parts, axes[0]) if axes else parts[0]
        assert relative_error(whole, gradient) < 1e-6, name


@pytest.mark.slow
def test_every_layout_equals_one_process(two_processes):
    expected, channels = step(ALONE), step(ALONE, **CHANNELS)
    for name, processes in two_processes.items():
        if name != "pp2-loop":
            wanted = channels if name.endswith("channels") else expected
            compare(processes, wanted, 2 if name.startswith("tp2") else 1)
    compare(two_processes["pp2-loop"], step(ALONE, **LOOPED), 1)
