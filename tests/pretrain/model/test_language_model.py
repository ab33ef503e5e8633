"""The whole model: packing, states, checkpointing of activations, initialisation, counts."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.common.config_loader import ConfigError
from pretrain.inference.generate import generate
from pretrain.model.build import build_model, padded_vocab_size
from pretrain.model.counts import count_model
from pretrain.nn.mixers import parts
from pretrain.nn.parameters import info_of
from pretrain.ops import short_convolution
from tests.helpers.relative_error import relative_error
from tests.helpers.small_model import VOCAB, make, settings

pytestmark = pytest.mark.usefixtures("processes")


def test_packed_documents_do_not_see_each_other():
    """Changing document A leaves B's losses and B's gradients bit-equal."""
    model = make(torch.float32)
    cu_seqlens = torch.tensor([0, 13, 40, 51])
    tokens, targets = torch.randint(VOCAB, (2, 1, 51))
    changed = tokens.clone()
    changed[0, :13] = torch.randint(VOCAB, (13,))
    changed[0, 40:] = torch.randint(VOCAB, (11,))
    losses, gradients = [], []
    for case in (tokens, changed):
        loss = model(case, targets, cu_seqlens=cu_seqlens)[0, 13:40]
        model.zero_grad()
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append(
            [p.grad.clone() for n, p in model.named_parameters() if not n.startswith("embedding")]
        )
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_packed_equals_each_alone():
    model = make()
    lengths = [7, 1, 30]
    tokens, targets = torch.randint(VOCAB, (2, 1, 38))
    packed = model(tokens, targets, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    alone = [
        model(a, b)
        for a, b in zip(tokens.split(lengths, 1), targets.split(lengths, 1), strict=True)
    ]
    assert relative_error(packed, torch.cat(alone, 1)) < 1e-12


def test_blocks_normalise_where_the_settings_say():
    model = make(block_norm="sandwich", block_norms={"attn": "post"}, norm_eps=1e-3)
    x = torch.randn(5, 2, 24, dtype=torch.float64)

    def normed(y, norm):
        return y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        sandwich, post = model.blocks[:2]
        y = x + sandwich.mixer(normed(x, sandwich.mixer_norm))[0]
        y = normed(y, sandwich.mixer_post_norm)
        y = normed(y + sandwich.mlp(normed(y, sandwich.mlp_norm)), sandwich.mlp_post_norm)
        assert relative_error(sandwich(x)[0], y) < 1e-12
        y = x + normed(post.mixer(x)[0], post.mixer_norm)
        y = y + normed(post.mlp(y), post.mlp_norm)
        assert relative_error(post(x)[0], y) < 1e-12
    with pytest.raises(ConfigError, match=r"norms\.atn: unknown mixer \(did you mean 'attn'"):
        make(block_norms={"atn": "post"})


def test_queries_and_keys_are_normalised_over_all_heads():
    attn = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "rope_theta": None}
    model = make(pattern="attn", mixers={"attn": {**attn, "qk_norm_over": "width"}})
    mixer, x = model.blocks[0].mixer, torch.randn(7, 1, 24, dtype=torch.float64)
    with torch.no_grad():
        for norm in (mixer.q_norm, mixer.k_norm):
            norm.copy_(torch.rand_like(norm) + 0.5)
        q, k, v = (x[:, 0] @ p.weight.T for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        q, k = (
            y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt() * norm
            for y, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
        )
        k, v = (y.view(7, 2, 6).repeat_interleave(2, 1) for y in (k, v))
        scores = torch.einsum("thd,shd->hts", q.view(7, 4, 6), k) / 6**0.5
        mask = torch.ones(7, 7).triu(1).bool()
        y = torch.einsum("hts,shd->thd", scores.masked_fill(mask, -torch.inf).softmax(-1), v)
        expected = y.flatten(1) @ mixer.o_proj.weight.T
        assert relative_error(mixer(x)[0][:, 0], expected) < 1e-12
    with pytest.raises(ConfigError, match="qk_norm_over is width, but qk_norm is false"):
        make(pattern="attn", mixers={"attn": {**attn, "qk_norm": False, "qk_norm_over": "width"}})


def test_a_batch_equals_its_rows():
    model = make()
    tokens, targets = torch.randint(VOCAB, (2, 3, 20))
    rows = torch.cat([model(a[None], b[None]) for a, b in zip(tokens, targets, strict=True)])
    assert relative_error(model(tokens, targets), rows) < 1e-12


def test_states_carry_on():
    model = make()
    tokens = torch.randint(VOCAB, (2, 17))
    whole = model(tokens)
    first, states = model.forward_with_state(tokens[:, :9], None)
    rest = []
    for t in range(9, 17):
        logits, states = model.forward_with_state(tokens[:, t : t + 1], states)
        rest.append(logits)
    assert relative_error(torch.cat([first, *rest], 1), whole) < 1e-10


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
def test_training_computes_no_last_inputs_of_convolutions(checkpointing, monkeypatch):
    wanted = []

    def recorded(*arguments, **options):
        wanted.append(options["final_state"])
        return short_convolution(*arguments, **options)

    monkeypatch.setattr(parts, "short_convolution", recorded)
    model = make(checkpointing=checkpointing)
    tokens, targets = torch.randint(VOCAB, (2, 1, 20))
    model(tokens, targets).sum().backward()
    per_pass = 2 * 3  # two blocks of Gated DeltaNet; q, k, v
    assert wanted == [False] * per_pass * (2 if checkpointing == "block" else 1)
    wanted.clear()
    model.states(tokens)
    assert wanted == [True] * per_pass


def test_generation_takes_the_likeliest_and_stops():
    model = make(torch.float32)
    ids = list(generate(model, [1], max_tokens=8, temperature=0, seed=0, vocab_size=VOCAB))
    tokens = [1]
    for _ in range(8):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert ids == tokens[1:]
    stopped = list(
        generate(
            model, [1], max_tokens=8, temperature=0, seed=0, vocab_size=VOCAB, stop_ids=[ids[3]]
        )
    )
    assert stopped == ids[: ids.index(ids[3])]


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model = make()
    tokens, targets = torch.randint(VOCAB, (2, 2, 9))
    expected = torch.nn.functional.cross_entropy(
        model(tokens).flatten(0, 1), targets.flatten(), reduction="none"
    )
    found = model(tokens, targets).flatten()  # megatron-core's, in float32
    assert relative_error(found, expected) < 1e-6


def test_activation_checkpointing_changes_nothing():
    plain, saving = make(torch.float32), make(torch.float32, checkpointing="block")
    tokens, targets = torch.randint(VOCAB, (2, 1, 40))
    cu_seqlens = torch.tensor([0, 25, 40])
    saved_bytes = []
    for model in (plain, saving):
        size = 0

        def count(t, size_of=lambda t: t.numel() * t.element_size()):
            nonlocal size
            size += size_of(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = model(tokens, targets, cu_seqlens=cu_seqlens).mean()
        saved_bytes.append(size)
        loss.backward()
    assert saved_bytes[1] < saved_bytes[0] / 2
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_initialisation_depends_on_seed_and_name_alone():
    a, b, c = make(seed=3), make(seed=3, pattern="gdn attn"), make(seed=4)
    shorter = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        if name in shorter and "o_proj" not in name and "down_proj" not in name:
            assert torch.equal(parameter, shorter[name]), name
    mixer = a.blocks[0].mixer
    assert not torch.equal(mixer.q_proj.weight, mixer.k_proj.weight)
    drawn = [n for n, p in a.named_parameters() if p.std() > 0]
    other = dict(c.named_parameters())
    assert drawn
    assert not any(torch.equal(dict(a.named_parameters())[n], other[n]) for n in drawn)


def test_output_projections_start_smaller():
    model = make(hidden_size=48, pattern="8*gdn", depth_scaled_init=True)
    block = model.blocks[0].mixer
    assert block.q_proj.weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert block.o_proj.weight.std().item() == pytest.approx(0.2 / 4, rel=0.2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu", "none"])
def test_parameters_declared_equal_counted(tied, mlp):
    config = settings(tie_embeddings=tied, mlp={"kind": mlp})
    model = build_model(config, VOCAB, seed=0)
    counts = count_model(config, VOCAB, 16)
    assert counts.parameters == sum(p.numel() for p in model.parameters())


def test_weight_decay_is_meant_for_matrices_only():
    model = make()
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and "_conv" not in name
        assert info_of(parameter).weight_decay == matrix, name


def test_gates_stay_wide_in_bf16():
    model = make(torch.bfloat16)
    wide = {n.split(".")[-1] for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "dt_bias"}


def test_bf16_loss_is_close():
    wide, narrow = make(torch.float32), make(torch.bfloat16)
    tokens, targets = torch.randint(VOCAB, (2, 2, 64))
    a, b = wide(tokens, targets), narrow(tokens, targets)
    assert b.dtype == torch.float32
    assert math.isclose(a.mean().item(), b.mean().item(), rel_tol=2e-2)


def test_vocabulary_is_padded():
    config = settings()
    assert padded_vocab_size(config, 4096) == 4096
    assert padded_vocab_size(config, 4097) == 4224
    assert padded_vocab_size(settings(vocab_size=77), 50) == 77
