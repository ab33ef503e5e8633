"""What a block keeps for the backward pass on a GPU in bf16, by its own code on meta tensors."""

from __future__ import annotations

import pytest
import torch

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig
from pretrain.data.sequences import Sequences
from pretrain.model.language_model import LanguageModel
from pretrain.model.spec import block_specs
from pretrain.nn.mixers import registry
from pretrain.planner.fake_group import planned_context
from pretrain.planner.simulation import Simulation
from pretrain.planner.software import Software

LENGTH = 128


def kept(checkpointing, length=LENGTH, **model):
    """Bytes a token, the block's output excluded, and the FLOPs of the backward pass."""
    config = build_config(ModelConfig, {"mlp": {"kind": "none"}, **model}, "test")
    context = planned_context(torch.bfloat16, 1, sequence_parallel=False)
    with torch.device("meta"):
        block = LanguageModel(config, 64, context, activation_checkpointing=checkpointing)
        shape = (length, 1, config.hidden_size)
        x = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
    with Simulation("cuda", Software()) as simulation:
        simulation.exclude([*block.parameters(), x])
        rows = Sequences.of_rows(1, length, "cpu")
        y, cost = simulation.measure(lambda: block.run_blocks(x, range(1), rows))
        _, back = simulation.measure(lambda: y.backward(torch.empty_like(y)))
    return cost.kept / length - 2 * config.hidden_size, back.flops


def llama(checkpointing):
    return kept(
        checkpointing,
        hidden_size=4096,
        pattern="attn",
        mixers={"attn": {"num_heads": 32, "num_kv_heads": 8}},
        mlp={"kind": "swiglu", "intermediate_size": 14_336},
    )


def test_a_llama_block_keeps_what_its_products_and_attention_need():
    """The residual between mixer and MLP, q, k, v, attention's result, gate and up; and without
    checkpointing both norms' results and the product of gate and up."""
    products = 2 * (4096 + (4096 + 2 * 1024) + 4096 + 2 * 14_336)
    recomputed = 2 * (4096 + 4096 + 14_336)
    plain, plain_flops = llama("none")
    saving, saving_flops = llama("selective")
    # Rotary angles and attention's sums besides.
    assert plain == pytest.approx(products + recomputed, rel=0.01)
    assert saving == pytest.approx(products, rel=0.01)
    assert saving_flops == plain_flops


@pytest.mark.parametrize("name", registry())
def test_every_mixer_keeps_less_and_multiplies_no_more(name):
    model = {"hidden_size": 128, "pattern": name}
    plain, plain_flops = kept("none", **model)
    saving, saving_flops = kept("selective", **model)
    assert saving <= plain - 2 * 128  # the norm's result at least
    # What is made of parameters alone, as large for any number of tokens, may be made again.
    (spec,) = block_specs(build_config(ModelConfig, model, "test"))
    assert saving_flops == plain_flops + spec.mixer.flops_per_pass(spec.config, 128)
