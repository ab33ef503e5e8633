"""Lower bounds that all layers of a kind share (HGRN, HGRN2), in one layer and in models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pretrain
from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig
from pretrain.model.build import build_model
from pretrain.model.counts import count_model
from pretrain.nn.parameters import info_of
from pretrain.nn.shared_tables import rising_bound
from tests.helpers.relative_error import relative_error

HIDDEN, VOCAB = 24, 64
pytestmark = pytest.mark.usefixtures("processes")


def model_of(pattern: str, **changes: Any) -> Any:
    shared = {"num_heads": 3, "head_dim": 4, "lower_bound": "shared"}
    mixers = {"hgrn2": shared, "other": {"kind": "hgrn2", **shared}, "attn": {"num_heads": 2}}
    mixers = {name: mixers[name] for name in mixers if name in pattern}
    values = {"hidden_size": HIDDEN, "pattern": pattern, "mixers": mixers, **changes}
    return build_model(
        build_config(ModelConfig, values, "test"), VOCAB, seed=1, dtype=torch.float64
    )


def bounds_of(table: torch.Tensor) -> torch.Tensor:
    """The bounds of all rows as the paper has them."""
    shares = table.softmax(0)
    return shares.cumsum(0) - shares[:1]


def test_bounds_are_the_running_sum_of_a_softmax_over_depth_with_gradients():
    table = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table.requires_grad_()
    found = torch.stack([rising_bound(table, row).sigmoid() for row in range(5)])
    assert relative_error(found, bounds_of(table)) < 1e-14
    weights = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((y * weights).sum(), table) for y in (found, bounds_of(table))]
    assert relative_error(*(gradient for (gradient,) in gradients)) < 1e-12
    assert torch.allclose(
        rising_bound(torch.zeros(4, 1), 3).sigmoid(), torch.tensor(3 / 4), rtol=1e-6
    )


def definition(mixer: Any, bound: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """HGRN2 of one row ``[T, d]``, token by token, with the least that a gate may be."""
    heads = mixer.num_heads
    q, f, v = (x @ getattr(mixer, f"{name}_proj").weight.T for name in "qfi")
    f = bound + (1 - bound) * torch.sigmoid(f)
    q, f, v = (t.unflatten(-1, (heads, -1)) for t in (F.silu(q), f, v))
    state, outputs = x.new_zeros(heads, mixer.key_dim, mixer.value_dim), []
    for t in range(len(x)):
        state = f[t][..., None] * state + (1 - f[t])[..., None] * v[t][:, None]
        outputs.append(torch.einsum("hk,hkv->hv", q[t] * mixer.key_dim**-0.5, state).flatten())
    y = torch.stack(outputs)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + mixer.config.norm_eps)
    return (y * mixer.norm) @ mixer.o_proj.weight.T


def test_three_layers_of_one_table_are_the_equations_with_the_tables_gradient():
    model = model_of("hgrn2 attn 2*hgrn2", mlp={"kind": "none"})
    table = model.tables["hgrn2"]["lower_bounds"].weight
    with torch.no_grad():
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(3)))
    mixers = [block.mixer for block in model.blocks if hasattr(block.mixer, "bounds")]
    x = torch.randn(
        11, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    ).requires_grad_()
    found = expected = x
    for row, mixer in enumerate(mixers):
        found = mixer(found[:, None])[0][:, 0]
        expected = definition(mixer, bounds_of(table)[row], expected)
    inputs = [x, table, *(p for mixer in mixers for p in mixer.parameters())]
    assert relative_error(found, expected) < 1e-12
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        assert relative_error(one, other) < 1e-10


def test_a_table_is_the_models_once_for_each_kind_and_counted():
    model = model_of("2*hgrn2 attn other hgrn2", recursion={"prelude": 1, "coda": 1, "times": 2})
    found = {n: tuple(p.shape) for n, p in model.named_parameters() if "bounds" in n}
    assert found == {
        "tables.hgrn2.lower_bounds.weight": (3, 12),
        "tables.other.lower_bounds.weight": (1, 12),
    }
    assert [model.blocks[i].mixer.bounds.row for i in (0, 1, 3, 4)] == [0, 1, 0, 2]
    counted = count_model(model.model_config, VOCAB, 8).parameters
    assert counted == sum(p.numel() for p in model.parameters())
    info = info_of(model.tables["hgrn2"]["lower_bounds"].weight)
    assert not info.weight_decay
    assert not info.matrix


def test_a_copy_of_a_model_reads_its_own_table():
    model = model_of("2*hgrn2")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.tables["hgrn2"]["lower_bounds"].weight[1] += 5
    tokens = torch.arange(6)[None]
    assert not torch.equal(copied(tokens), model(tokens))
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))


def test_a_single_layer_has_a_table_of_one_row():
    layer = pretrain.mixer(
        "hgrn2", hidden_size=HIDDEN, num_heads=3, head_dim=4, lower_bound="shared"
    )
    assert dict(layer.named_parameters())["mixer.bounds.table.weight"].shape == (1, 12)
    layer(torch.randn(2, 5, HIDDEN))[0].sum().backward()
