"""Models that begin as another one with attention layers converted to other mixers."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from pretrain.common.config_loader import ConfigError, build_config
from pretrain.common.errors import UserError
from pretrain.config import InitializeConfig, ModelConfig, load_run_config
from pretrain.config.conversion import ATTENTION
from pretrain.export.importing import import_model
from pretrain.inference.load import load_model
from pretrain.model.build import build_model
from pretrain.model.spec import converted_settings
from pretrain.nn.mixers import registry
from pretrain.nn.mixers.attention import Attention
from pretrain.parallel.processes import stop_processes
from pretrain.training.initialization import fill_from, initialize_from
from pretrain.training.trainer import Trainer
from tests.helpers import conversion_worker
from tests.helpers.conversion_worker import CASES, LAYOUTS, started
from tests.helpers.processes import run_on
from tests.helpers.relative_error import relative_error
from tests.helpers.training_run import QUICK, Run

VOCAB = 50
ABLE = [name for name, mixer in registry().items() if mixer.conversion is not None]
NEW = [name for name in ABLE if name not in ATTENTION]
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
# What takes over v, k and q, where they have other names.
NAMES = {"mamba2": ("x", "b", "c"), "hgrn2": ("i", None, "q")}


def settings(pattern, mixers=None, **changes):
    values = {
        "hidden_size": 24,
        "pattern": pattern,
        "mixers": {"attn": HEADS, **(mixers or {})},
        "mlp": {"ratio": 2},
        "init_std": 0.2,
        **changes,
    }
    return build_config(ModelConfig, values, "test")


def make(pattern, mixers=None, seed=0, **changes):
    model = settings(pattern, mixers, **changes)
    return build_model(model, VOCAB, seed=seed, dtype=torch.float64)


def convert(mixer, source, pattern=None, how="qkvo", given=None, method="stepwise", **changes):
    """The target before and after it is filled from ``source``."""
    mixers = {mixer: converted_settings(mixer, given or {}, source.model_config)}
    built = [make(pattern or f"{mixer} attn", mixers, seed=1, **changes) for _ in range(2)]
    config = InitializeConfig("x", convert={mixer: how}, method=method)
    fill_from(built[1], source, config, "source")
    return built


def test_what_counts_as_attention():
    assert set(ATTENTION) == {n for n, mixer in registry().items() if issubclass(mixer, Attention)}
    assert {"gdn", "deltanet", "gla", "retnet", "linear_attn", "kda", "mamba2"} < set(ABLE)
    assert {"delta_product", "hgrn2", "swa"} < set(ABLE) and "para_gru" not in ABLE


@pytest.mark.parametrize("mixer", NEW)
def test_a_mixer_takes_over_the_projections(mixer):
    source = make("2*attn")
    before, after = convert(mixer, source)
    old, new, start = source.blocks[0].mixer, after.blocks[0].mixer, before.blocks[0].mixer
    v, k, q = NAMES.get(mixer, ("v", "k", "q"))
    heads, steps = 4, getattr(new.config, "num_householder", 1)
    taken = {f"{q}_proj.weight": old.q_proj.weight, "o_proj.weight": old.o_proj.weight}
    for name, weight in ((k, old.k_proj.weight), (v, old.v_proj.weight)):
        if name is not None:
            shared = [weight[6 * (h // 2) : 6 * (h // 2 + 1)] for h in range(heads)]
            taken[f"{name}_proj.weight"] = torch.cat([s for s in shared for _ in range(steps)])
    for name, value in taken.items():
        assert torch.equal(new.get_parameter(name), value), name
    for name, parameter in new.named_parameters():
        if name.endswith("_conv"):
            assert (parameter[:, -1] == 1).all() and (parameter[:, :-1] == 0).all(), name
        elif name not in taken and name not in ("A_log", "dt_bias", "a_bias"):
            assert torch.equal(parameter, start.get_parameter(name)), name
    if mixer in ("gdn", "kda", "delta_product"):
        decay = torch.exp(-new.A_log.exp().mean() * torch.nn.functional.softplus(new.dt_bias))
        assert decay.detach().numpy() == pytest.approx(math.exp(-0.01))
    if mixer == "gla":
        decay = new.a_bias.sigmoid() ** (1 / 16)
        assert decay.detach().numpy() == pytest.approx(math.exp(-0.01))
    # Everything else is the source's.
    for name, parameter in after.named_parameters():
        if not name.startswith("blocks.0.mixer."):
            assert torch.equal(parameter, source.get_parameter(name)), name
    loss = after(torch.arange(22).view(1, -1)[:, :-1], torch.arange(22).view(1, -1)[:, 1:]).mean()
    loss.backward()
    assert torch.isfinite(loss) and new.o_proj.weight.grad.abs().sum() > 0


def test_a_window_that_sees_everything_is_the_source():
    tokens = torch.randint(VOCAB, (2, 17))
    options = {"qk_norm": True, "qkv_bias": True, "output_gate": True, "rotary_dim": 2}
    source = make("2*attn", {"attn": {**HEADS, **options}})
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for window, equal in ((17, True), (3, False)):
        _, after = convert("swa", source, given={"window": window}, pattern="2*swa")
        assert (relative_error(after(tokens), source(tokens)) < 1e-12) == equal


def test_fresh_mixers_and_what_is_not_converted():
    source = make("2*attn")
    before, after = convert("gdn", source, how="none")
    for name, parameter in after.named_parameters():
        origin = before if name.startswith("blocks.0.mixer.") else source
        assert torch.equal(parameter, origin.get_parameter(name)), name
    # An attention layer may begin anew, too; the bound of all layers of a kind is the model's.
    fresh = make("2*attn", seed=1)
    fill_from(fresh, source, InitializeConfig("x", convert={"attn": "none"}), "source")
    assert torch.equal(fresh.embedding.weight, source.embedding.weight)
    assert torch.equal(
        fresh.blocks[0].mixer.q_proj.weight, make("2*attn", seed=1).blocks[0].mixer.q_proj.weight
    )
    _, after = convert("hgrn2", source, given={"lower_bound": "shared"}, pattern="2*hgrn2")
    assert torch.equal(after.embedding.weight, source.embedding.weight)
    # Nothing to convert: the source's bits.
    same = make("2*attn", seed=1)
    fill_from(same, source, InitializeConfig("x", convert={"attn": "qkvo"}), "source")
    tokens = torch.randint(VOCAB, (1, 9))
    assert torch.equal(same(tokens), source(tokens))


def test_a_loop_of_converted_mixers():
    """Differences of full rank make a loop what the converted blocks are one after another."""
    source = make("4*attn")
    given = {"feature_map": "identity"}  # with which nothing begins anew but norms, all alike
    tokens = torch.randint(VOCAB, (1, 11))
    _, plain = convert("linear_attn", source, given=given, pattern="4*linear_attn")
    _, looped = convert(
        "linear_attn",
        source,
        given=given,
        pattern="2*linear_attn",
        method="average",
        recursion={"times": 2, "lora_rank": 48},
    )
    assert relative_error(looped.eval()(tokens), plain.eval()(tokens)) < 1e-8
    # What begins anew has no difference yet, and can learn one.
    _, looped = convert("gdn", source, pattern="2*gdn", recursion={"times": 2, "lora_rank": 2})
    gate = looped.blocks[0].mixer.g_proj
    assert (gate.lora_b == 0).all() and (gate.lora_a != 0).any()


@pytest.mark.parametrize(
    ("mixer", "given", "pattern", "message"),
    [
        ("gdn", {"num_heads": 2}, "gdn attn", "mixers.gdn.num_heads is 2, expected 4"),
        ("gdn", {"head_dim": 4}, "gdn attn", "mixers.gdn.head_dim is 4, expected 6"),
        ("gdn", {"expand_v": 2}, "gdn attn", "mixers.gdn.expand_v is 2.0, expected 1.0"),
        ("mamba2", {"num_groups": 2}, "mamba2 attn", "num_groups is 2, expected 4"),
        ("swa", {"num_kv_heads": 4}, "swa attn", "num_kv_heads is 4, expected 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(mixer, given, pattern, message):
    with pytest.raises(UserError, match=message):
        convert(mixer, make("2*attn"), given=given, pattern=pattern)


def test_what_cannot_be_converted_is_refused():
    source = make("gdn attn", {"gdn": {"num_heads": 2, "head_dim": 4}})
    target = make("kda attn", {"kda": {"num_heads": 4, "head_dim": 6}})
    with pytest.raises(UserError, match=r"kda, to begin as attention .* block 0 of here is gdn"):
        fill_from(target, source, InitializeConfig("x", convert={"kda": "qkvo"}), "here")
    with pytest.raises(UserError, match=r"expected the same, or initialize.convert to say what"):
        fill_from(target, source, InitializeConfig("x"), "here")
    for name, message in (
        ("para_gru", r"para_gru is qkvo, which it cannot take over; .* that can: .*gdn"),
        ("gnd", r"unknown mixer 'gnd' \(did you mean 'gdn'\?\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            converted_settings(name, {}, source.model_config)
    with pytest.raises(ConfigError, match="which has no attention to take it from"):
        converted_settings("kda", {}, settings("2*gdn", {"gdn": {"num_heads": 2, "head_dim": 4}}))
    wide = settings("attn", {"attn": {"num_heads": 4, "head_dim": 8}})
    with pytest.raises(ConfigError, match="values are as wide as the model, 24, and the attention"):
        converted_settings("hgrn2", {}, wide)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, corpus):
    """A trained transformer of four layers."""
    stop_processes()  # of other tests: a Trainer makes its own
    run = Run(tmp_path_factory.mktemp("teacher"), corpus, "teacher", steps=4)
    attention = "model.mixers={attn: {num_heads: 4, num_kv_heads: 2}}"
    Trainer(run.config, overrides=[*QUICK, "model.pattern=4*attn", attention]).fit()
    return run


STUDENT = """
name: student
data: {{path: {data}}}
optimizer: {{lr: 1e-2}}
schedule: {{warmup_steps: 2}}
train: {{steps: 4, seq_len: 32, global_batch_tokens: 128}}
parallel: {{micro_batch_size: 2}}
initialize: {{checkpoint: {checkpoint}, {how}}}
directory: {directory}
"""


def student(folder, corpus, teacher, how, name="student"):
    path = folder / f"{name}.yaml"
    path.write_text(
        STUDENT.format(data=corpus, checkpoint=teacher, how=how, directory=folder / name)
    )
    return path


def test_the_layers_that_are_kept_make_the_model(tmp_path, corpus, teacher):
    path = student(tmp_path, corpus, teacher.directory, "convert: {gdn: qkvo}, keep: [1, 3]")
    model = load_run_config(path, ["model.dropout=0.1"]).model
    assert model.pattern == "gdn attn gdn attn" and model.hidden_size == 24
    assert model.dropout == 0.1
    assert {"num_heads": 4, "head_dim": 6, "expand_v": 1.0}.items() <= model.mixers["gdn"].items()
    assert model.mixers["attn"]["num_kv_heads"] == 2
    for keep, pattern in (("[]", "4*gdn"), ("[0,1,2,3]", "4*attn"), ("[2]", "2*gdn attn gdn")):
        assert load_run_config(path, [f"initialize.keep={keep}"]).model.pattern == pattern
    # A pattern that says the same is taken, and then the source is needed no more.
    gone = "initialize.checkpoint=nowhere"
    given = ["model.pattern=2*(gdn attn)", "model.hidden_size=24"]
    assert load_run_config(path, [given[0]]).model.pattern == "gdn attn gdn attn"
    assert load_run_config(path, [gone, *given]).model.pattern == "2*(gdn attn)"
    fits = load_run_config(path, [*given, "initialize.keep=null"]).model  # a pattern alone
    assert fits.mixers["gdn"]["expand_v"] == 1.0
    for overrides, message in (
        (["initialize.keep=[4]"], r"keep has 4, but .* has 4 blocks, 0 to 3; expected some"),
        (["initialize.keep=[-1]"], r"initialize.keep is \[-1\], expected at least 0"),
        (["model.pattern=4*gdn"], r"model.pattern is '4\*gdn', but initialize.keep \[1, 3\] makes"),
        (
            ["initialize.convert={kda: qkvo}"],
            r"names 2 mixers beside initialize.keep, expected one",
        ),
        ([gone], r"nowhere holds no checkpoint to read; expected a run directory"),
        (
            ["initialize.keep=null", "model.pattern=4*attn"],
            r"convert has 'gdn', expected mixers of",
        ),
        (["initialize.checkpoint=hf:some/model"], r"checkpoint is hf:some/model, expected a run, "),
        (["initialize.convert.gdn=qkv"], r"convert.gdn is 'qkv'.*expected one of: qkvo, none"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_run_config(path, [*overrides, *(given[1:] if "=null" in overrides[0] else [])])


def files_of(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_a_converted_model_trains_and_the_source_stays(tmp_path, corpus, teacher):
    before = files_of(teacher.directory)
    how = "convert: {gdn: qkvo}, keep: [1, 3]"
    path = student(tmp_path, corpus, teacher.directory, how)
    stop_processes()
    settings = [*QUICK, "validation.tokens=128"]
    result = Trainer(path, overrides=settings).fit()
    assert result.status == "completed"
    assert files_of(teacher.directory) == before
    converted = load_model(tmp_path / "student")
    assert converted.run.model.pattern == "gdn attn gdn attn"
    # Nothing converted and a rate of almost nothing: the source's loss in every bit.
    stop_processes()
    copy = student(
        tmp_path, corpus, teacher.directory, "convert: {gdn: qkvo}, keep: [0,1,2,3]", "c"
    )
    Trainer(copy, overrides=[*settings, "train.steps=2", "optimizer.lr=1e-30"]).fit()
    source = load_model(teacher.directory).model
    for name, parameter in load_model(tmp_path / "c").model.named_parameters():
        assert torch.equal(parameter, source.get_parameter(name)), name


def test_an_imported_model_is_a_source(tmp_path, corpus):
    pytest.importorskip("transformers")
    from tests.helpers.small_llama import make_llama

    run = tmp_path / "run"
    import_model(str(make_llama(tmp_path / "llama", "adds nothing")), run)
    path = student(tmp_path, corpus, run, "convert: {kda: qkvo}, keep: [0]")
    config = load_run_config(path)
    model, source = config.model, load_model(run).model
    assert model.pattern.split()[0] == "attn" and "kda" in model.pattern
    built = build_model(model, source.vocab_size, seed=1)
    assert config.initialize is not None
    initialize_from([built], config.initialize)
    for name in ("blocks.1.mixer.q_proj.weight", "blocks.1.mlp.up_proj.weight"):
        assert torch.equal(built.get_parameter(name), source.get_parameter(name)), name


@pytest.mark.slow
def test_every_layout_starts_from_the_same_weights(tmp_path, teacher):
    run_on(2, conversion_worker.__name__, teacher.directory, tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    stop_processes()
    for case in CASES:
        alone = started(case, str(teacher.directory))
        for layout in LAYOUTS:
            for name, (value, axis) in alone.items():
                parts = [part[name][0] for part in found[layout][case] if name in part]
                axes = {part[name][1] for part in found[layout][case] if name in part}
                assert parts, (layout, name)
                (axis,) = axes
                sharded = layout == "tp2" and axis is not None
                whole = torch.cat(parts, axis) if sharded else parts[0]
                assert torch.equal(whole, value), (case, layout, name)
