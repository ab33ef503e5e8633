"""What the start line says of a model's size: parameters, those of a token, loops."""

from __future__ import annotations

import pytest

from pretrain.model.build import build_model
from pretrain.model.counts import count_model
from tests.helpers.small_model import VOCAB, settings


@pytest.mark.parametrize(
    ("experts", "top_k", "first_dense"), [(4, 1, 0), (4, 3, 1), (2, 2, 0), (8, 2, 2)]
)
def test_a_token_goes_through_some_of_the_experts(experts, top_k, first_dense):
    moe = {"num_experts": experts, "top_k": top_k, "intermediate_size": 24}
    config = settings(
        pattern="attn gdn attn",
        moe={
            **moe,
            "shared_intermediate_size": 8,
            "shared_gate": True,
            "first_dense": first_dense,
        },
    )
    model = build_model(config, VOCAB, seed=0)
    named = dict(model.named_parameters())
    of_experts = sum(
        p.numel()
        for name, p in named.items()
        if p.ndim == 3 and name.endswith(("gate_up_proj", "down_proj"))
    )
    counts = count_model(config, VOCAB, 16)
    assert of_experts > 0
    assert counts.idle_parameters == of_experts * (experts - top_k) // experts
    active = f"a token goes through {counts.parameters - counts.idle_parameters:,}"
    assert (active in counts.describe()) == (top_k < experts)


@pytest.mark.parametrize(
    ("recursion", "words"),
    [
        ({"times": 3}, ", 3 passes through blocks 0 to 3"),
        ({"times": 2, "prelude": 1, "coda": 1}, ", 2 passes through blocks 1 to 2"),
        ({"times": 5, "prelude": 3}, ", 5 passes through block 3"),
    ],
)
def test_loops_are_told(recursion, words):
    config = settings(pattern="4*gdn", recursion=recursion)
    assert count_model(config, VOCAB, 16).describe().endswith(words)
    plain = count_model(settings(pattern="4*gdn"), VOCAB, 16)
    assert plain.describe() == (
        f"{plain.parameters:,} parameters ({plain.embedding_parameters:,} in embeddings)"
    )
