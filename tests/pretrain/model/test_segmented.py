"""Rows that come in segments: losses and gradients are those of the row as a whole."""

from __future__ import annotations

import pytest
import torch

from pretrain.data.sequences import Sequences, segment_of
from pretrain.model.segmented import _Row, segments
from pretrain.nn.mixers import registry
from tests.helpers.live_memory import LiveMemory
from tests.helpers.relative_error import relative_error
from tests.helpers.small_mixers import SMALL
from tests.helpers.small_model import VOCAB, make

pytestmark = pytest.mark.usefixtures("processes")
TOKENS = 96
ROWS = {
    "one": [96],
    "crossing": [30, 20, 26, 20],
    "at borders": [48, 24, 8, 16],
    "short": [1, 7, 1, 30, 2, 1, 25, 28, 1],
    "long tail": [5, 91],
}
SIZES = (48, 24, 8)
HYBRIDS = ("gdn attn swa mamba2", "gru kda rat para_gru")


def small(pattern, **changes):
    names = [name for name in pattern.split() if SMALL.get(name)]
    mixers = {name: SMALL[name][0] for name in names}
    return make(pattern=pattern, mixers=mixers, **changes)


def gradients(model, size, tokens, targets, weights, sequences):
    """Return the losses, and every parameter's gradient of their weighted sum."""
    model.zero_grad()
    model.segment_tokens = size
    model.begin_step(seed=3, step=5)
    losses = model(tokens, targets, sequences=sequences)
    (losses * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses, **grads}


def check(model, lengths, sizes=SIZES, tolerance=1e-10):
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(VOCAB, (2, 1, sum(lengths)), generator=generator)
    weights = torch.rand(tokens.shape, generator=generator)
    arguments = (tokens, targets, weights, Sequences.from_lengths(lengths))
    expected = gradients(model, None, *arguments)
    assert len(expected) > 5
    for size in sizes:
        found = gradients(model, size, *arguments)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert relative_error(found[name], value) < tolerance, (size, name)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", registry())
def test_every_mixer(name, row):
    """Every mixer sees every row and every size, and every row each size, of other mixers."""
    turn = list(ROWS).index(row) + list(registry()).index(name)
    check(small(name), ROWS[row], SIZES[turn % 3 :][:1])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("pattern", HYBRIDS)
def test_hybrids(pattern, row):
    """Segments of a single token, of which there are many, are of rows in turn."""
    single = (list(ROWS).index(row) + HYBRIDS.index(pattern)) % 2 == 0
    check(small(pattern), ROWS[row], (*SIZES, 17, *([1] if single else [])))


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.2},
        {"tie_embeddings": True, "logit_softcap": 5.0},
        {"z_loss_weight": 0.1},
        {"mlp": {"kind": "none"}, "block_norm": "sandwich"},
        {"moe": {"num_experts": 4, "top_k": 2, "intermediate_size": 16, "balance_weight": 0.3}},
        {
            "moe": {
                "num_experts": 4,
                "top_k": 2,
                "intermediate_size": 16,
                "score": "sigmoid",
                "bias_update_rate": 0.01,
                "z_loss_weight": 0.1,
            }
        },
    ],
    ids="-".join,
)
def test_options_of_the_model(changes):
    check(small("gdn attn", **changes), ROWS["crossing"])


def test_experts_count_each_token_once():
    moe = {"num_experts": 4, "top_k": 2, "intermediate_size": 16, "bias_update_rate": 0.01}
    model, found = small("gdn", moe=moe), []
    tokens, targets = torch.randint(VOCAB, (2, 1, TOKENS))
    for size in (None, 24):
        gradients(model, size, tokens, targets, 1.0, None)
        found.append((model.metrics(), [experts._seen for experts in model.experts()]))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1][0], found[1][1][0])


def test_evaluation_comes_in_segments_too():
    model = small("gdn attn", dropout=0.5).eval()
    tokens, targets = torch.randint(VOCAB, (2, 1, TOKENS))
    seen = []
    model.final_norm.register_forward_hook(lambda *x: seen.append(len(x[2])))
    with torch.no_grad():
        expected = model(tokens, targets)
        model.segment_tokens = 40
        assert relative_error(model(tokens, targets), expected) < 1e-12
    assert seen == [96, 40, 40, 16]


def test_a_second_backward_pass_is_refused():
    model = small("gdn")
    model.segment_tokens = 48
    loss = model(*torch.randint(VOCAB, (2, 1, TOKENS))).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="expected one backward pass for each forward pass"):
        loss.backward()


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("count", [1, 2, 4, 12])
def test_segments_are_those_of_several_processes(lengths, count):
    row = Sequences.from_lengths([0, *lengths, 0])
    found = list(segments(row, TOKENS // count))
    assert [s.tokens for s in found] == [
        slice(n * TOKENS // count, (n + 1) * TOKENS // count) for n in range(count)
    ]
    for number, segment in enumerate(found):
        expected = segment_of(row, number, count)
        assert segment.lengths == expected.lengths
        assert expected.segment is not None
        continues = (*expected.segment.continues, False)
        assert segment.continues == continues[number]
        assert segment.goes_on == continues[number + 1]


def peak(model, size, tokens):
    """Return the most bytes that a step on one document takes beyond the parameters."""
    model.segment_tokens = size
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveMemory() as memory:
        model(*torch.randint(VOCAB, (2, 1, tokens))).sum().backward()
    return memory.peak


@pytest.mark.parametrize("pattern", ["gdn mamba2 gru", "swa kda para_gru", "m2rnn gla"])
def test_memory_is_flat_where_states_are(pattern):
    model = small(pattern, dtype=torch.float32)
    short, long, whole = peak(model, 32, 256), peak(model, 32, 1024), peak(model, None, 256)
    assert long < 1.3 * short
    assert short < 0.5 * whole
    assert peak(model, None, 768) > 2 * whole  # the count counts


@pytest.mark.parametrize("name", ["attn", "rat"])
def test_what_is_kept_of_growing_states_is_linear(name):
    model = small(name)

    def kept(count):
        tokens, targets = torch.randint(VOCAB, (2, 1, count))
        row = _Row(model, tokens, targets, list(segments(Sequences.from_lengths([count]), 32)))
        with torch.no_grad():
            row.losses(keep=True)
        states = [state for border in row.borders if border for state in border]
        values = [value for state in states for value in state.values() if not value.is_meta]
        storages = {v.untyped_storage().data_ptr(): v.untyped_storage() for v in values}
        return sum(storage.nbytes() for storage in storages.values())

    assert kept(2048) < 4.5 * kept(512)
