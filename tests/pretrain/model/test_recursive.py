"""Recursion over depth: loops against the blocks written out, sampling, halting, initialisation."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.common.config_loader import ConfigError, build_config
from pretrain.common.errors import UserError
from pretrain.config import InitializeConfig, ModelConfig, OptimizerConfig
from pretrain.model.build import build_model, build_stages
from pretrain.model.counts import count_model
from pretrain.model.depth_lora import DepthLoRA
from pretrain.model.recursion import sample_recurrences
from pretrain.model.spec import check_model
from pretrain.training.engine import Engine
from pretrain.training.initialization import fill_from
from tests.helpers.recursion_kinds import KINDS, RECURRENT_DEPTH
from tests.helpers.relative_error import relative_error
from tests.helpers.small_training import batches

pytestmark = pytest.mark.usefixtures("processes")
VOCAB = 50


def settings(pattern="gdn attn para_gru gdn", recursion=None, **changes):
    values = {
        "hidden_size": 24,
        "pattern": pattern,
        "mixers": {
            "gdn": {"num_heads": 2, "head_dim": 4, "chunk_size": 8},
            "attn": {"num_heads": 4, "num_kv_heads": 2},
            "para_gru": {"num_heads": 2},
        },
        "mlp": {"ratio": 2},
        "init_std": 0.2,
        "recursion": recursion,
        **changes,
    }
    return build_config(ModelConfig, values, "test")


def make(dtype=torch.float64, checkpointing="none", **changes):
    model = build_model(
        settings(**changes), VOCAB, seed=0, dtype=dtype, activation_checkpointing=checkpointing
    )
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(params=KINDS, ids=str)
def recursion(request):
    return KINDS[request.param]


def test_a_loop_is_the_same_blocks_written_out():
    looped = make(recursion={"prelude": 1, "coda": 1, "times": 3}, depth_scaled_init=False)
    written = make(pattern="gdn 3*(attn para_gru) gdn", depth_scaled_init=False)
    copies = {0: [0], 1: [1, 3, 5], 2: [2, 4, 6], 3: [7]}
    with torch.no_grad():
        for k, places in copies.items():
            for i in places:
                written.blocks[i].load_state_dict(looped.blocks[k].state_dict())
        written.embedding.load_state_dict(looped.embedding.state_dict())
    tokens, targets = torch.randint(VOCAB, (2, 2, 13))
    a, b = looped(tokens, targets), written(tokens, targets)
    assert relative_error(a, b) < 1e-12
    a.sum().backward()
    b.sum().backward()
    for k, places in copies.items():
        names = dict(looped.blocks[k].named_parameters())
        for name, parameter in names.items():
            total = sum(dict(written.blocks[i].named_parameters())[name].grad for i in places)
            assert relative_error(parameter.grad, total) < 1e-10, name


def test_residual_sums_of_a_loop_have_learned_scalars():
    plain, loop = make(recursion=KINDS["looped"]), {**KINDS["looped"], "residual_scales": True}
    scaled = make(recursion=loop)
    tokens = torch.randint(VOCAB, (1, 16), generator=torch.Generator().manual_seed(1))
    assert torch.equal(scaled(tokens), plain(tokens))  # they begin as 1
    numbers = torch.tensor([0.5, 2.0, -1.0, 3.0], dtype=torch.float64)
    with torch.no_grad():
        for block in scaled.blocks:
            block.residual_scales.copy_(numbers)
    x = scaled.embedding(tokens)
    for _ in range(3):
        for block in scaled.blocks:
            x = 0.5 * x + 2 * block.mixer(block.mixer_norm(x))[0]
            x = -x + 3 * block.mlp(block.mlp_norm(x))
    assert torch.allclose(scaled.hidden_states(tokens), x.transpose(0, 1), rtol=1e-12)
    scaled(tokens).square().sum().backward()
    for block in scaled.blocks:
        assert block.residual_scales.grad.all()
    beside = make(recursion={**KINDS["looped"], "prelude": 1, "residual_scales": True}).blocks
    assert [block.residual_scales is None for block in beside] == [True, False, False, False]


def test_states_carry_on(recursion):
    model = make(recursion=recursion).eval()
    tokens = torch.randint(VOCAB, (2, 17))
    whole, final = model.forward_with_state(tokens, None)
    first, states = model.forward_with_state(tokens[:, :9], None)
    rest = []
    for t in range(9, 17):
        logits, states = model.forward_with_state(tokens[:, t : t + 1], states)
        rest.append(logits)
    assert relative_error(torch.cat([first, *rest], 1), whole) < 1e-10
    assert relative_error(model(tokens), whole) < 1e-10
    prelude, coda = (recursion.get(name, 0) for name in ("prelude", "coda"))
    assert len(final) == prelude + (4 - prelude - coda) * recursion["times"] + coda


def test_packed_equals_each_alone(recursion):
    model = make(recursion=recursion).eval()
    lengths = [7, 1, 20]
    tokens, targets = torch.randint(VOCAB, (2, 1, 28))
    packed = model(tokens, targets, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    alone = [
        model(a, b)
        for a, b in zip(tokens.split(lengths, 1), targets.split(lengths, 1), strict=True)
    ]
    assert relative_error(packed, torch.cat(alone, 1)) < 1e-10


def test_activation_checkpointing_changes_nothing(recursion):
    tokens, targets = torch.randint(VOCAB, (2, 1, 20))
    gradients = []
    for checkpointing in ("none", "selective", "block"):
        torch.manual_seed(0)
        model = make(torch.float32, checkpointing, recursion=recursion)
        model.recursion.begin_step(0, 1, 0)
        model(tokens, targets).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, *recomputed in zip(*gradients, strict=True):
        for b in recomputed:
            assert (plain is None) == (b is None)
            assert plain is None or torch.equal(plain, b)


@pytest.mark.parametrize("norm", ["pre", "sandwich", "post"])
def test_parameters_and_flops_declared_equal_counted(recursion, norm):
    if recursion.get("step_signal") == "coordinate":
        recursion = {**recursion, "step_signal": "sinusoidal", "position_offsets": 0}
    config = settings("4*gdn", recursion, block_norm=norm, vocab_size=VOCAB, scale_embeddings=True)
    model = build_model(config, VOCAB, seed=0, dtype=torch.float64).eval()
    counts = count_model(config, VOCAB, 16)
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.forward_with_state(torch.randint(VOCAB, (1, 16)), None)
    assert counter.get_total_flops() == 16 * counts.flops_per_token
    states = model.to(torch.float32).forward_with_state(torch.randint(VOCAB, (1, 16)), None)[1]
    # Everything in float32 here; what is declared has convolutions in bfloat16.
    counted = sum(t.numel() * (2 if "conv" in k else 4) for s in states for k, t in s.items())
    assert counted == counts.state_bytes


def test_training_flops_follow_the_passes():
    config = settings("4*gdn", {**RECURRENT_DEPTH, "times": 8, "backprop_last": 3})
    counts = count_model(config, VOCAB, 16)
    outside = counts.flops_per_token - 8 * counts.loop_flops
    assert counts.training_flops() == 3 * outside + counts.loop_flops * (8 + 2 * 3)
    assert counts.training_flops(2) == 3 * outside + counts.loop_flops * (2 + 2 * 2)
    assert count_model(settings(), VOCAB, 16).training_flops() == 3 * (
        count_model(settings(), VOCAB, 16).flops_per_token
    )


def test_gradients_go_through_the_last_passes_alone():
    """Passes before the last k are as if their result were given."""
    model = make(recursion={**RECURRENT_DEPTH, "times": 5, "backprop_last": 2})
    tokens, targets = torch.randint(VOCAB, (2, 1, 9))
    model.recursion.begin_step(0, 0, 0)
    model(tokens, targets).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    recursion = model.recursion
    kept, inputs = [], []
    original = recursion.forward

    def recorded(x, run, **settings):
        inputs.append(x)

        def run_and_keep(state, i):
            kept.append(run(state, i))
            return kept[-1]

        return original(x, run_and_keep, **settings)

    recursion.forward = recorded
    recursion.begin_step(0, 0, 0)
    model(tokens, targets)
    assert [k.requires_grad for k in kept] == [False] * 3 + [True] * 2
    # The same from the third pass's result, as a model of two passes.
    given = kept[2].detach()
    recursion.forward = original
    recursion.config.times, recursion.config.backprop_last = 2, None
    recursion.initial = lambda x: given
    model(tokens, targets).sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(found[name], parameter.grad) < 1e-12, name


def test_recurrences_are_drawn_alike_and_follow_the_paper():
    draws = [sample_recurrences(32, 7, step) for step in range(4000)]
    assert draws[:50] == [sample_recurrences(32, 7, step) for step in range(50)]
    assert statistics.mean(draws) == pytest.approx(33, abs=1)
    assert statistics.median(draws) == pytest.approx(29, abs=1.5)
    assert statistics.stdev(draws) == pytest.approx(17.8, abs=1.5)
    model = make(recursion={**RECURRENT_DEPTH, "sampling": "poisson"})
    expected = sample_recurrences(3, 5, 11)
    tokens, targets = torch.randint(VOCAB, (2, 1, 5))

    def losses(rank, world_size, micro_batches):
        model.recursion.begin_step(5, 11, rank, world_size)
        found = [model(tokens, targets).sum().item() for _ in range(micro_batches)]
        assert model.recursion.metrics() == {"recurrences": expected}
        return found

    # The same tokens: only the random states tell micro-batches apart. Two processes taking them by
    # turns see what one sees.
    alone = losses(0, 1, 4)
    assert len(set(alone)) == 4
    assert [losses(0, 2, 2), losses(1, 2, 2)] == [alone[::2], alone[1::2]]
    assert model.recursion.metrics() == {}


def test_a_random_state_is_drawn_for_each_sequence():
    """Whatever size micro-batches have, and for rows as for tokens packed in one row."""

    def state(size, rows=1, step=0, **context):
        loop = make(torch.float32, recursion=RECURRENT_DEPTH).recursion
        loop.seq_len = 8 if rows == 1 else None
        loop._context = dataclasses.replace(loop._context, **context)
        found = []
        loop.begin_step(0, step)
        for _ in range(4 // size):
            loop.num_passes()
            x = torch.empty(8 * size // rows // loop._context.tensor_size, rows, 24)
            found.append(loop.initial(x).transpose(0, 1).flatten(0, 1))
        return torch.cat(found)

    one = state(1)
    for size in (2, 4):
        assert torch.equal(state(size), one)
        assert torch.equal(state(size, rows=size), one)
        halves = [
            state(size, sequence_parallel=True, tensor_size=2, tensor_rank=rank) for rank in (0, 1)
        ]
        pieces = [x.view(4 // size, -1, 24) for x in halves]  # of each micro-batch
        assert torch.equal(torch.cat(pieces, 1).flatten(0, 1), one)
    assert len(torch.cat([one, state(1, step=1)]).unique(dim=0)) == 2 * 4 * 8


def test_the_size_of_micro_batches_changes_nothing():
    found = []
    for size in (1, 2, 4):
        config = settings(recursion={**RECURRENT_DEPTH, "sampling": "poisson"}, dropout=0.1)
        (model,) = build_stages(config, VOCAB, seed=0, seq_len=32)
        engine = Engine(model, OptimizerConfig(lr=1e-3))
        for step in range(2):
            engine.begin_step(0, step)
            result = engine.train_step(batches(step, micro_batch_size=size), 1e-3)
            found.append((result.loss, result.grad_norm))
    for a, b in zip(found, found[2:], strict=False):
        assert a == pytest.approx(b, rel=1e-5)


def test_evaluation_takes_the_number_of_passes_it_is_told():
    model = make(recursion=RECURRENT_DEPTH).eval()
    tokens = torch.randint(VOCAB, (1, 6))
    three = model(tokens)
    model.recursion.set_times(3)
    assert torch.equal(model(tokens), three)
    model.recursion.set_times(5)
    assert not torch.equal(model(tokens), three)
    assert len(model.forward_with_state(tokens, None)[1]) == 1 + 5 * 2 + 1
    for recursion in (KINDS["lora"], KINDS["learned"]):
        with pytest.raises(UserError, match="learned 3 different passes"):
            make(recursion=recursion).recursion.set_times(4)
    with pytest.raises(UserError, match="at least 1"):
        model.recursion.set_times(0)


def test_halting_weighs_the_states_of_each_token():
    """Against the algorithm of arXiv 1603.08983 written out token by token."""
    model = make(recursion={**KINDS["halting"], "step_signal": "none"}).eval()
    recursion, threshold = model.recursion, model.recursion.config.halting_threshold
    recursion.halting_bias.data.fill_(-0.5)
    x = torch.randn(7, 2, 24, dtype=torch.float64)
    states, probabilities = [], []

    def run(state, index):
        logit = state @ recursion.halting_weight[0] + recursion.halting_bias
        probabilities.append(torch.sigmoid(logit))
        states.append(torch.tanh(state + index))
        return states[-1]

    output, cost = recursion(x, run, all_passes=True)
    used = set()
    for t in range(7):
        for b in range(2):
            total, mixed = 0.0, torch.zeros(24, dtype=torch.float64)
            for n in range(4):
                p = probabilities[n][t, b].item()
                if total + p > threshold or n == 3:
                    mixed += (1 - total) * states[n][t, b]
                    assert cost[t, b].item() == pytest.approx(n + 1 + 1 - total)
                    used.add(n)
                    break
                total += p
                mixed += p * states[n][t, b]
            assert relative_error(output[t, b], mixed) < 1e-12
    assert len(used) > 1


def test_ponder_cost_is_in_the_gradient_and_not_in_the_loss():
    losses, gradients = [], []
    for weight in (0.0, 0.5):
        model = make(recursion={**KINDS["halting"], "ponder_weight": weight})
        tokens, targets = torch.randint(
            VOCAB, (2, 1, 9), generator=torch.Generator().manual_seed(1)
        )
        loss = model(tokens, targets)
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append(model.recursion.halting_bias.grad)
    assert torch.equal(*losses)
    assert not torch.equal(*gradients)


@pytest.mark.parametrize(
    ("recursion", "message"),
    [
        ({"prelude": 2, "coda": 2}, "leave nothing to loop over of the pattern's 4 blocks"),
        ({"state_init": "zeros"}, "needs adapter=true"),
        ({"sampling": "poisson", "lora_rank": 4}, "lora_rank needs a fixed number of passes"),
        ({"sampling": "poisson", "halting": True}, "halting needs a fixed number of passes"),
        ({"halting": True, "backprop_last": 1}, "backprop_last is 1; with halting"),
        ({"times": 0}, "times is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(recursion, message):
    with pytest.raises(ConfigError, match=message):
        check_model(settings(recursion=recursion), "config")


def source_and_target(method, lora="zero", rank=0, pattern="gdn 6*attn gdn"):
    source = make(pattern=pattern)
    recursion = {"prelude": 1, "coda": 1, "times": 3, "lora_rank": rank}
    target = make(pattern="gdn 2*attn gdn", recursion=recursion)
    fill_from(target, source, InitializeConfig("source", method, lora), "source")
    return source, target


@pytest.mark.parametrize(
    ("method", "origins"),
    [("stepwise", [[1], [6]]), ("lower", [[1], [2]]), ("average", [[1, 3, 5], [2, 4, 6]])],
)
def test_a_loop_is_made_from_a_trained_model(method, origins):
    source, target = source_and_target(method)
    for k, indices in enumerate([[0], *origins, [7]]):
        for name, parameter in target.blocks[k].named_parameters():
            expected = torch.stack([source.blocks[i].get_parameter(name) for i in indices]).mean(0)
            assert torch.equal(parameter, expected), name
    assert torch.equal(target.embedding.weight, source.embedding.weight)


def test_full_rank_differences_give_back_the_source():
    """With norms alike, SVD of full rank loses nothing, and a lower rank loses less than none."""
    tokens = torch.randint(VOCAB, (1, 11))
    source, target = source_and_target("average", "svd", rank=96)
    assert relative_error(target.eval()(tokens), source.eval()(tokens)) < 1e-8
    errors = []
    for rank in (2, 12):
        _, target = source_and_target("average", "svd", rank)
        lost = [
            torch.linalg.matrix_norm(
                source.blocks[1 + 2 * b].mixer.q_proj.weight
                - target.blocks[1].mixer.q_proj.weight
                - target.blocks[1].mixer.q_proj.lora_b[b] @ target.blocks[1].mixer.q_proj.lora_a[b]
            )
            for b in range(3)
        ]
        errors.append(torch.stack(lost).sum().item())
    assert errors[1] < errors[0]
    assert isinstance(target.blocks[1].mixer.q_proj, DepthLoRA)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"mlp": {"kind": "gelu", "ratio": 2}}, "MLP of kind and width"),
        ({"mlp": {"kind": "none"}}, "MLP of kind and width"),
        ({"block_norm": "sandwich"}, "model.block_norm sandwich, expected pre"),
        ({"block_norms": {"attn": "post"}}, r"model.block_norms \{'attn': 'post'\}, expected"),
        ({"norm_eps": 1e-3}, "model.norm_eps"),
        ({"scale_embeddings": True}, "model.scale_embeddings True, expected False"),
        ({"tie_embeddings": False}, "an untied head"),
        ({"recursion": {"times": 2}}, "holds a recursive model"),
    ],
)
def test_a_source_of_another_make_is_refused(source, message):
    target = make(pattern="gdn attn")
    with pytest.raises(UserError, match=message):
        fill_from(target, make(pattern="gdn attn", **source), InitializeConfig("x"), "source")


def test_the_same_model_is_taken_as_it_is():
    tokens = torch.randint(VOCAB, (1, 11))
    chunks = {"gdn": {"num_heads": 2, "head_dim": 4, "chunk_size": 16}}  # changes speed alone
    for recursion in (None, KINDS["lora"]):
        source = make(recursion=recursion)
        target = build_model(
            settings(recursion=recursion, mixers={**settings().mixers, **chunks}),
            VOCAB,
            seed=5,
            dtype=torch.float64,
        )
        fill_from(target, source, InitializeConfig("source"), "source")
        assert relative_error(target.eval()(tokens), source.eval()(tokens)) < 1e-12
    untied = build_model(settings(tie_embeddings=False), VOCAB, seed=5, dtype=torch.float64)
    tied = make()
    fill_from(untied, tied, InitializeConfig("source"), "source")
    assert relative_error(untied.eval()(tokens), tied.eval()(tokens)) < 1e-12


def test_a_source_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"has 7 blocks; 1 \+ 3 x 2 \+ 1 = 8 were expected"):
        source_and_target("average", pattern="gdn 5*attn gdn")
    with pytest.raises(UserError, match="block 1 of the model is attn"):
        source_and_target("lower", pattern="gdn 6*gdn gdn")
