"""The wavefront sampler against plain decoding with the shared cache, and its identities."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.inference.load import load_model
from pretrain.inference.wavefront import (
    Draw,
    WavefrontReport,
    WavefrontSampler,
    wavefront_ids,
)
from pretrain.inference.wavefront_rules import Row, Wavefront
from tests.helpers import processes
from tests.helpers.channel_mixing import CHANNELS, with_output
from tests.helpers.recursion_kinds import KINDS, RECURRENT_DEPTH
from tests.helpers.small_model import VOCAB, make
from tests.helpers.training_run import Run

pytestmark = pytest.mark.usefixtures("processes")
PROMPT, COUNT = [7, 1, 30], 10
QUIET: dict[str, Any] = {"noise": 0.0, "ema": 0.0}
KINDS_OF_MODEL: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("4*attn", {}),
    "recurrent": ("gdn para_gru gdn attn", {}),
    "first values": ("rwkv7 attn rwkv7 gdn", {}),
    "channels": ("4*attn", {}),
    "learned signal": ("4*attn", {"step_signal": "learned", "times": 20}),
    "coordinates": ("2*attn 2*gdn", {"step_signal": "coordinate", "state_init": "input"}),
}


@cache
def contraction(kind="attention"):
    """A model whose loop settles: the adapter reads its state less than its input."""
    pattern, changes = KINDS_OF_MODEL[kind]
    recursion = {**RECURRENT_DEPTH, **changes}
    model = make(
        pattern=pattern,
        mixers={
            "attn": {"num_heads": 4, "num_kv_heads": 2},
            "gdn": {"num_heads": 2, "head_dim": 4, "chunk_size": 8},
            "para_gru": {"num_heads": 2},
            "rwkv7": {"num_heads": 2},
        },
        recursion=recursion,
        block_norm="sandwich",
        **(CHANNELS if kind == "channels" else {}),
    ).eval()
    with_output(model)
    with torch.no_grad():
        model.recursion.adapter[:, :24] *= 0.3
    return model


def shared(states, model, passes):
    """The last pass's states in place of all passes'."""
    config, loop = model.recursion.config, model.recursion
    loop.set_times(passes)
    coda = len(states) - config.coda
    return [*states[: config.prelude], *states[coda - 2 : coda] * passes, *states[coda:]]


@torch.no_grad()
def plain(model, passes, eps=0.0, count=COUNT):
    """Ids and passes of greedy decoding with the shared cache, by nothing but the model's passes.

    A token's are those after which its state has changed by less than ``eps``.
    """
    found = []
    hook = model.recursion.register_forward_hook(lambda _, __, out: found.append(out[0]))
    loop, text, depths = model.recursion, [], []
    try:
        loop.set_times(passes)
        logits, states = model.forward_with_state(torch.tensor([PROMPT]), None)
        depths.append(passes)
        while True:
            text.append(int(logits[0, -1].argmax()))
            if len(text) == count:
                return text, depths
            before, old = states, loop.initial(model.embed(torch.zeros(1, 1, dtype=torch.int64)))
            for depth in range(1, passes + 1):
                start = shared(before, model, depth)
                logits, states = model.forward_with_state(torch.tensor([text[-1:]]), start)
                states = shared(states, model, 1)
                new = found[-1]
                if (new - old).norm() / new.norm() < eps:
                    break
                old = new
            depths.append(depth)
    finally:
        hook.remove()
        loop.set_times(None)


def sampled(model, passes, count=COUNT, **settings):
    """Ids and report of the sampler."""
    report = WavefrontReport()
    model.recursion.set_times(passes)
    try:
        config = Wavefront(**{**QUIET, **settings})
        ids = wavefront_ids(model, PROMPT, config, Draw(VOCAB), max_tokens=count, report=report)
        return list(ids), report
    finally:
        model.recursion.set_times(None)


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_one_position_at_a_time_is_plain_decoding(kind):
    model = contraction(kind)
    for passes, inner in ((1, 1), (4, 1), (4, 3)):
        ids, depths = plain(model, passes)
        found, report = sampled(model, passes, wavefront=1, criterion="fixed", inner=inner)
        assert (found, report.depths) == (ids, [depths])
        assert report.core_calls == report.core_positions == passes * (COUNT - 1)
        assert report.prompt_calls == passes
        assert f"{passes}.00 passes and {passes}.00 calls of the loop" in report.describe()


@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_with_a_threshold_a_token_leaves_as_soon_as_it_has_settled(kind):
    model = contraction(kind)
    ids, depths = plain(model, 12, eps=0.05)
    found, report = sampled(model, 12, wavefront=1, inner=1, eps=0.05)
    assert (found, report.depths) == (ids, [depths])
    assert len(set(depths[1:])) > 1
    assert max(depths[1:]) < 12


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_any_window_with_one_pass_is_plain_decoding(kind):
    model = contraction(kind)
    for wavefront, inner in ((2, 1), (4, 2)):
        found, report = sampled(model, 1, wavefront=wavefront, inner=inner)
        assert (found, report.depths) == plain_lists(model, 1)


def plain_lists(model, passes):
    ids, depths = plain(model, passes)
    return ids, [depths]


SETTINGS: dict[str, dict[str, Any]] = {
    "prefixes": {"wavefront": 8, "inner": 1, "criterion": "fixed"},
    "settled": {"wavefront": 4, "inner": 2, "eps": 0.01},
    "tokens": {"wavefront": 4, "inner": 4, "criterion": "token", "steady": 4},
    "headway": {"wavefront": 8, "inner": 2, "eps": 0.01, "headway": 3},
    "mixed": {"wavefront": 16, "inner": 2, "eps": 0.01, "ema": 0.1, "noise": 0.02},
    "published": {"wavefront": 4, "inner": 5, "eps": 0.01, "published": True},
    "published tokens": {"wavefront": 4, "inner": 5, "criterion": "token", "published": True},
    "published steps": {"wavefront": 9, "inner": 5, "criterion": "fixed", "published": True},
}


@pytest.mark.parametrize(
    "kind",
    [
        "attention",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("recurrent", "first values")),
    ],
)
def test_what_settles_settles_on_the_tokens_of_plain_decoding(kind):
    model = contraction(kind)
    ids, _ = plain(model, 20)
    calls = {}
    for name, settings in SETTINGS.items():
        found, report = sampled(model, 20, **settings)
        assert found == ids, name
        assert len(report.depths[0]) == COUNT
        calls[name] = report.core_calls
    # Positions that start before the one in front has settled: fewer calls for the same tokens.
    assert calls["settled"] < calls["prefixes"] < 20 * COUNT
    assert calls["published"] < 20 * COUNT


@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_states_behind_a_window_are_those_of_plain_decoding(kind):
    model = contraction(kind)

    def row_after(wavefront, start):
        config = Wavefront(wavefront=wavefront, inner=3, eps=1e-10, **QUIET)
        sampler = WavefrontSampler(model, [PROMPT], config, Draw(VOCAB), max_tokens=COUNT)
        while sampler.rows[0].start < start:
            sampler.step()
        return sampler.rows[0], sampler.report

    model.recursion.set_times(60)
    try:
        row, report = row_after(6, start=8)
        plain_row, plain_report = row_after(1, start=row.start)
    finally:
        model.recursion.set_times(None)
    assert report.steps < plain_report.steps
    assert plain_row.start == row.start
    assert plain_row.text[:5] == row.text[:5]
    for a, b in zip(plain_row.cache, row.cache, strict=True):
        for name, value in a.items():
            torch.testing.assert_close(value, b[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["attention", "recurrent"])
@pytest.mark.parametrize("published", [False, True])
def test_texts_do_not_depend_on_those_beside_them(kind, published):
    model = contraction(kind)
    prompts = [[7, 1, 30], [4], [9, 9, 2, 8, 5]]
    config = Wavefront(wavefront=4, inner=2, eps=0.2, headway=2, noise=0.2, published=published)

    def texts(some, seed):
        # By the published rule what is drawn anew in each step hardly ever settles.
        draw = Draw(VOCAB, temperature=0.0 if published else 1.0, top_k=20, seed=seed)
        sampler = WavefrontSampler(model, some, config, draw, max_tokens=7, stop_ids=[3])
        return sampler.texts(), sampler.report.depths

    together, depths = texts(prompts, 5)
    for n, prompt in enumerate(prompts):
        assert texts([prompt], 5 + n) == ([together[n]], [depths[n]])
    assert published or texts(prompts, 50)[0] != together


def test_what_was_said_stays_said():
    model = contraction("recurrent")
    config = Wavefront(wavefront=6, inner=1, eps=0.3)
    draw = Draw(VOCAB, temperature=1.0, seed=1)
    sampler = WavefrontSampler(model, [PROMPT, [2]], config, draw, max_tokens=10)
    before = [list(row.text) for row in sampler.rows]
    while sampler.open:
        sampler.step()
        for row, old in zip(sampler.rows, before, strict=True):
            assert row.text[: len(old)] == old
        before = [list(row.text) for row in sampler.rows]
    streamed = list(wavefront_ids(model, PROMPT, config, draw, max_tokens=10))
    assert streamed == before[0]
    ends = wavefront_ids(model, PROMPT, config, draw, max_tokens=10, stop_ids=[streamed[4]])
    assert list(ends) == streamed[: streamed.index(streamed[4])]
    assert list(wavefront_ids(model, PROMPT, config, draw, max_tokens=0)) == []


def test_the_published_rule_compares_with_a_later_position_after_the_window_moved():
    states = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    generator = torch.Generator()

    def leaving(before, after, shift, **settings):
        row = Row([], 5, [1, 2, 3], states, generator, since=[4, 4, 4], shift=shift)
        config = Wavefront(eps=0.1, **settings)
        return row.leaving(before, after, [2, 3, 4], 9, config)

    # Nothing has changed: all leave by our rule, as published all but the last.
    assert leaving(states, states, 1) == 3
    assert leaving(states, states, 0, published=True) == 2
    # After a move by one, what has not changed is compared with its neighbour, and does not settle;
    # what equals the neighbour's old state does.
    assert leaving(states, states, 1, published=True) == 0
    assert leaving(states, states.roll(-1, 0), 1, published=True) == 1
    assert leaving(states, states, None, published=True) == 0
    # Our rule: the longest settled prefix, and none whose token has just changed.
    changed = states.clone()
    changed[1] += 1
    assert leaving(states, changed, 0) == 1
    assert leaving(states, changed, 0, published=True) == 2
    row = Row([], 5, [1, 8, 3], states, generator, since=[4, 4, 4])
    assert row.leaving(states, states, [2, 3, 4], 9, Wavefront(eps=0.1)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wavefront": 0}, "wavefront is 0, expected at least 1"),
        ({"inner": 0}, "inner is 0, expected at least 1"),
        ({"eps": float("nan")}, "eps is nan, expected 0 or more"),
        ({"ema": 1.0}, "ema is 1.0, expected at least 0 and below 1"),
        ({"noise": 1.5}, "noise is 1.5, expected 0 to 1"),
        ({"criterion": "entropy"}, "criterion is 'entropy', expected one of latent, token, fixed"),
        ({"wavefront": 2, "headway": 3}, "headway is 3, expected at most wavefront = 2"),
        ({"wavefront": 1, "published": True}, "wavefront is 1, expected at least 2 with the"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        sampled(contraction(), 4, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "this model has none"),
        ({"recursion": KINDS["looped"]}, "expected adapter=true"),
        ({"recursion": {**KINDS["halting"], "adapter": True}}, "expected halting=false"),
        ({"recursion": {**KINDS["lora"], "adapter": True}}, "expected lora_rank=0"),
        (
            {"recursion": RECURRENT_DEPTH, "pattern": "attn 2*sliced_attn attn"},
            "sliced_attn attends differently in each; expected another mixer",
        ),
    ],
)
def test_models_that_cannot_be_refined_are_refused(changes, message):
    model = make(mixers={}, **changes).eval()
    with pytest.raises(UserError, match=message):
        list(wavefront_ids(model, PROMPT, Wavefront(), Draw(VOCAB), max_tokens=2))


def test_the_published_rule_ends_where_nothing_settles():
    with pytest.raises(UserError, match=r"has made 1 tokens in .* expected a larger eps than 0"):
        sampled(contraction(), 2, count=2, published=True, wavefront=2, inner=4, eps=0.0)


@pytest.mark.slow
def test_the_command_samples_in_parallel(tmp_path, corpus):
    run = Run(tmp_path, corpus, "deep")
    names = ("prelude=0", "times=4", "adapter=true", "state_init=random")
    status, output = run.finish("train.steps=2", *(f"model.recursion.{name}" for name in names))
    assert status == 0, output
    words = ("--prompt", "def f", "--max-tokens", "9", "--temperature", "0")
    options = ("--parallel", "--wavefront", "3", "--inner", "2", "--noise", "0")
    done = processes.run("evals", "sample", run.directory, *words, *options)
    assert done.returncode == 0, done.stderr
    assert "calls of the loop per token" in done.stderr.splitlines()[-1]
    report = WavefrontReport()
    config = Wavefront(wavefront=3, inner=2, noise=0.0)
    text = load_model(run.directory).generate("def f", max_tokens=9, parallel=config, report=report)
    assert done.stdout == f"{text}\n"
    assert len(report.depths[0]) == 9
    assert report.describe() in done.stderr
    refused = processes.run("evals", "sample", f"hf:{tmp_path}", "--parallel")
    assert refused.returncode == 2
    assert "--parallel is for models with recurrent depth of runs, not for" in refused.stderr
