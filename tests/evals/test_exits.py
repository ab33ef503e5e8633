"""Tokens that leave a loop by themselves: against plain passes, one by one, in batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError
from pretrain.config import ModelConfig
from pretrain.data.sequences import Sequences
from pretrain.inference import exits
from pretrain.inference.depth_used import flops
from pretrain.inference.exiting import ExitingModel
from pretrain.inference.exits import CRITERIA, ExitRule, divergence
from pretrain.inference.generate import generate
from pretrain.inference.score import Pair, Prompt, StateScorer
from pretrain.model.build import build_model
from pretrain.nn.mixers import attention
from tests.helpers.channel_mixing import CHANNELS, with_output
from tests.helpers.recursion_kinds import KINDS, RECURRENT_DEPTH
from tests.helpers.relative_error import relative_error

pytestmark = pytest.mark.usefixtures("processes")
VOCAB = 50
LOOPS = {name: loop for name, loop in KINDS.items() if not loop.get("halting")}


def make(recursion=RECURRENT_DEPTH, pattern="gdn attn swa gdn", **changes):
    values = {
        "hidden_size": 24,
        "pattern": pattern,
        "mixers": {
            "gdn": {"num_heads": 2, "head_dim": 4, "chunk_size": 8},
            "attn": {"num_heads": 4, "num_kv_heads": 2},
            "swa": {"num_heads": 2, "window": 5},
        },
        "mlp": {"ratio": 2},
        "init_std": 0.3,
        "recursion": recursion,
        **changes,
    }
    model = build_model(
        build_config(ModelConfig, values, "test"), VOCAB, seed=0, dtype=torch.float64
    )
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def with_exits(model, rule, cache="latest", **options):
    return ExitingModel(model, ExitRule.parse(rule, cache=cache, **options))


def middling(model, criterion="latent", cache="latest"):
    """A rule by which half of the tokens leave after the second pass: the median of its values."""
    values, name = [], "change" if criterion in ("latent", "cosine") else "divergence"
    kept = getattr(exits, name)
    never = with_exits(model, f"{criterion}:0", cache)

    def recording(*arguments):
        values.append(kept(*arguments))
        return values[-1]

    tokens = torch.randint(VOCAB, (1, 15), generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exits, name, recording)
        never.read(tokens, None)
    return f"{criterion}:{float(torch.cat(values[1 :: never.times - 1]).median())}"


def ids_of(model, prompt=(3, 1, 4), count=12):
    options = {"max_tokens": count, "temperature": 0.0, "seed": 0, "vocab_size": VOCAB}
    return list(generate(model, list(prompt), **options))


@pytest.mark.parametrize(
    ("kind", "criterion"),
    [
        *((kind, "latent") for kind in LOOPS),
        *(("depth", name) for name in CRITERIA if name not in ("latent", "argmax")),
    ],
)
def test_a_threshold_of_0_is_plain_decoding_and_an_endless_one_a_single_pass(kind, criterion):
    model = make(LOOPS[kind])
    tokens = torch.randint(VOCAB, (2, 9))
    never = with_exits(model, f"{criterion}:0")
    logits, states = never.forward_with_state(tokens, None)
    assert relative_error(logits, model(tokens)) < 1e-12
    assert never.summary()["passes"] == {"3": 1.0}
    rest, _ = never.forward_with_state(tokens, states)
    plain = model.forward_with_state(tokens, model.forward_with_state(tokens, None)[1])[0]
    assert relative_error(rest, plain) < 1e-12
    for least in (1, 2):
        at_once = with_exits(model, f"{criterion}:inf", min_passes=least)
        logits, states = at_once.forward_with_state(tokens, None)
        assert at_once.summary()["mean_passes"] == least
        model.recursion.times = least
        assert relative_error(logits, model(tokens)) < 1e-12
        model.recursion.times = None


@pytest.mark.parametrize("cache", ["latest", "shared"])
def test_greedy_texts_of_a_threshold_of_0_and_of_one_pass(cache):
    model = make()
    if cache == "latest":
        assert ids_of(with_exits(model, "kl:0")) == ids_of(model)
    model.recursion.times = 1
    plain = ids_of(model)
    assert ids_of(with_exits(model, "kl:0", cache)) == plain
    model.recursion.times = None
    assert ids_of(with_exits(model, "kl:inf", cache)) == plain


@pytest.mark.parametrize(
    ("kind", "criterion", "cache"),
    [
        *((kind, "latent", "latest") for kind in LOOPS),
        ("looped", "kl", "latest"),
        ("depth", "kl", "latest"),
        ("lora", "latent", "shared"),
        ("depth", "kl", "shared"),
        ("depth channels", "latent", "latest"),
        ("lora channels", "latent", "latest"),
        ("lora channels", "latent", "shared"),
    ],
)
def test_tokens_together_one_by_one_and_packed_leave_alike(kind, criterion, cache):
    """Together, their layers read a token's last input again; one by one, states are told of it."""
    kind, _, mlp = kind.partition(" ")
    model = with_output(make({**LOOPS[kind], "times": 4}, **(CHANNELS if mlp else {})))
    exiting = with_exits(model, middling(model, criterion, cache), cache, min_passes=2)
    lengths = [7, 1, 12]
    tokens = torch.randint(VOCAB, (1, 20), generator=torch.Generator().manual_seed(2))
    packed = exiting.read(tokens, None, sequences=Sequences.from_lengths(lengths))
    assert len(set(packed.used.passes.tolist())) > 1
    rows, passes, states = [], [], []
    for text in tokens.split(lengths, 1):
        now = None
        for token in text.split(1, 1):
            found = exiting.read(token, now)
            now = found.states
            rows.append(found.rows)
            passes += found.used.passes.tolist()
        states.append(now)
    assert passes == packed.used.passes.tolist()
    assert relative_error(packed.rows, torch.cat(rows)) < 1e-9
    # And they go on alike: each text alone, and as rows of a batch in another order.
    following = torch.randint(VOCAB, (3, 4), generator=torch.Generator().manual_seed(3))
    order = torch.tensor([2, 0, 1])
    batch = exiting.read(following[order], exiting.select_states(packed.states, order))
    for row, number in enumerate(order.tolist()):
        alone = exiting.read(following[number : number + 1], states[number])
        part = slice(4 * row, 4 * row + 4)
        assert alone.used.passes.tolist() == batch.used.passes[part].tolist()
        assert alone.used.positions.tolist() == batch.used.positions[part].tolist()
        assert relative_error(batch.rows[part], alone.rows) < 1e-9


def test_the_shared_rule_written_out():
    """One state for each block: every pass goes on from what the last token's last pass left."""
    model = make()
    exiting = with_exits(model, middling(model, "latent", "shared"), "shared")
    tokens = torch.randint(VOCAB, (1, 15), generator=torch.Generator().manual_seed(4))
    found = exiting.read(tokens, None)
    states = [block.mixer.init_state(1) for block in model.blocks]
    passes = found.used.passes.tolist()
    assert len(set(passes)) > 1
    with torch.no_grad():
        for token, number in zip(tokens[0].tolist(), passes, strict=True):
            x = model.embed(torch.tensor([[token]]))
            x, states[0] = model.blocks[0](x, state=states[0])
            state, after = model.recursion.initial(x), states
            for index in range(number):
                state, after = model.recursion.pass_input(state, x, index), list(states)
                for block in (1, 2):
                    state, after[block] = model.blocks[block](state, state=states[block])
            y, after[3] = model.blocks[3](model.final_norm(state), state=states[3])
            states = after
    assert relative_error(found.rows[-1], y[0, 0]) < 1e-10


@pytest.mark.parametrize("criterion", CRITERIA)
def test_values_are_finite_from_the_first_pass_on(criterion):
    model = make({**RECURRENT_DEPTH, "state_init": "zeros", "times": 6})
    tokens = torch.randint(VOCAB, (1, 30))
    # A threshold above any value but infinity: of 100 nats, of a change by twice its size.
    largest = {"argmax": 1, "entropy": 101}.get(criterion, 100)
    assert with_exits(model, f"{criterion}:{largest}").read(tokens, None).used.passes.max() == 1


def test_criteria_of_distributions_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.16, 0.04]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.25, 0.46, 0.04]], dtype=torch.float64)
    kl = float((p * (p / q).log()).sum())
    assert float(divergence("kl", p.log(), q.log())) == pytest.approx(kl)
    assert float(divergence("kl", None, q.log())) == pytest.approx(
        float((0.25 * (0.25 / q).log()).sum())
    )
    cut_p = torch.tensor([0.5, 0.3, 0.16, 0.25], dtype=torch.float64)
    cut_q = torch.tensor([0.25, 0.25, 0.46, 0.25], dtype=torch.float64)
    cut_p, cut_q = cut_p / cut_p.sum(), cut_q / cut_q.sum()
    wanted = float((cut_p * (cut_p / cut_q).log()).sum())
    assert float(divergence("likely-kl", p.log(), q.log())) == pytest.approx(wanted)
    entropies = [float(-(d * d.log()).sum()) for d in (p, q)]
    assert float(divergence("entropy", p.log(), q.log())) == pytest.approx(
        abs(entropies[1] - entropies[0])
    )
    assert float(divergence("entropy", None, q.log())) == pytest.approx(100 - entropies[1])


def test_the_likeliest_token_must_stay_for_so_many_passes():
    model = make({**RECURRENT_DEPTH, "coda": 0, "times": 7})
    tokens = torch.randint(VOCAB, (1, 25), generator=torch.Generator().manual_seed(5))
    likeliest = []
    for times in range(1, 8):
        model.recursion.times = times
        likeliest.append(model(tokens[:, :1]).argmax(-1).item())
    model.recursion.times = None
    for wanted in (1, 2, 3):
        run, expected = 0, 7
        for number, token in enumerate(likeliest, 1):
            run = run + 1 if number > 1 and token == likeliest[number - 2] else 1
            if run >= wanted:
                expected = number
                break
        found = with_exits(model, f"argmax:{wanted}").read(tokens[:, :1], None).used
        assert found.passes.tolist() == [expected]
    assert with_exits(model, "argmax:8").read(tokens, None).used.passes.tolist() == [7] * 25


def test_looks_only_after_so_many_passes():
    model = make({**RECURRENT_DEPTH, "times": 8})
    tokens = torch.randint(VOCAB, (1, 20))
    for criterion in ("latent", "kl"):
        rule = middling(model, criterion)
        found = with_exits(model, rule, min_passes=2, every=3).read(tokens, None).used
        assert set(found.passes.tolist()) <= {2, 5, 8}
        # The output is read after the passes that are looked at, and those before.
        if criterion == "kl":
            reads = {2: 2, 5: 4, 8: 4}
            assert found.outputs.tolist() == [reads[n] for n in found.passes.tolist()]


def test_a_batch_of_texts_is_scored_and_continued_as_each_alone():
    model = make({**RECURRENT_DEPTH, "times": 4})
    exiting = with_exits(model, middling(model, "kl"))
    scorer = StateScorer(exiting, VOCAB)
    pairs = [Pair([1, 2, 3], [4, 5]), Pair([1, 2, 7, 8, 9], [1]), Pair([6], [4, 5, 6, 7])]
    prompts = [Prompt([5, 6, 7], 6, lambda ids: False), Prompt([9], 4, lambda ids: False)]
    together = scorer.log_likelihoods(pairs), scorer.generate(prompts)
    alone = (
        [scorer.log_likelihoods([pair])[0] for pair in pairs],
        [scorer.generate([prompt])[0] for prompt in prompts],
    )
    assert together[1] == alone[1]
    for (a, hit_a), (b, hit_b) in zip(together[0], alone[0], strict=True):
        assert a == pytest.approx(b, rel=1e-9)
        assert hit_a == hit_b
    assert 1 < exiting.summary()["mean_passes"] < 4


@pytest.mark.parametrize(("criterion", "cache"), [("latent", "latest"), ("kl", "shared")])
def test_flops_are_those_of_what_is_computed(criterion, cache, monkeypatch):
    model = make({**RECURRENT_DEPTH, "times": 5}, pattern="attn gru attn attn")
    exiting = with_exits(model, middling(model, criterion, cache), cache)
    pairs, plain = [], attention.attention

    def counting(q, k, v, **options):  # torch does not count attention on a CPU
        pairs.append(4 * q.shape[-2] * q.shape[-1] * k.shape[1])
        return plain(q, k, v, **options)

    monkeypatch.setattr(attention, "attention", counting)
    states, seen = None, set()
    for token in torch.randint(VOCAB, (1, 12), generator=torch.Generator().manual_seed(6))[0]:
        pairs.clear()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            found = exiting.read(token.view(1, 1), states)
            exiting.next_logits(found.rows)
        states = found.states
        counted = flops(found.used, model.model_config, VOCAB)
        assert counter.get_total_flops() + sum(pairs) == float(counted[0])
        seen.add(int(found.used.passes[0]))
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"text": "kll:1"}, "exit is 'kll:1', whose criterion is unknown"),
        ({"text": "kl:x"}, "expected a number from 0 after 'kl:'"),
        ({"text": "kl:-1"}, "expected a number from 0"),
        ({"text": "kl:nan"}, "expected a number from 0"),
        ({"text": "argmax:2.5"}, "expected a whole number from 1"),
        ({"text": "kl", "min_passes": 0}, "min_passes is 0, expected at least 1"),
        ({"text": "kl", "every": 0}, "exit_every is 0, expected at least 1"),
        ({"text": "kl", "cache": "full"}, "exit_cache is full, with which deep passes"),
        ({"text": "kl", "cache": "none"}, "exit_cache is 'none', expected latest or shared"),
    ],
)
def test_what_is_no_rule_is_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        ExitRule.parse(**options)


def test_models_that_tokens_cannot_leave_are_refused():
    with pytest.raises(UserError, match="has no loop"):
        with_exits(make(None), "kl")
    with pytest.raises(UserError, match="halts by itself"):
        with_exits(make(KINDS["halting"]), "kl")
    with pytest.raises(UserError, match="passes add coordinates"):
        with_exits(make({"times": 3, "step_signal": "coordinate"}), "kl")
    with pytest.raises(UserError, match="min_passes is 4, but the loop makes 3 passes"):
        with_exits(make(), "kl", min_passes=4)
    with pytest.raises(UserError, match="rwkv7 blocks in the loop hand values"):
        with_exits(make({"times": 2}, pattern="rwkv7 rwkv7", mixers={}), "kl")
    assert math.isinf(ExitRule.parse("kl:inf").threshold)
