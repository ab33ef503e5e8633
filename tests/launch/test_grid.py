"""Grids: what they expand to, and what is refused."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from launch.expansion import load_grid
from launch.matching import counts_of
from launch.throughput import write_throughput
from pretrain.common.config_loader import ConfigError
from pretrain.config.pattern import parse_pattern
from pretrain.model.spec import block_specs

ROOT = Path(__file__).parents[2]
GRIDS = sorted((ROOT / "configs/grids").glob("*.yaml"))
BASE = """
name: g
model: {hidden_size: 32, pattern: "2*gdn", mixers: {gdn: {num_heads: 2, head_dim: 8},
        attn: {num_heads: 2}}}
data: {path: nowhere}
train: {steps: 10, seq_len: 16, global_batch_tokens: 64}
schedule: {warmup_steps: 2}
parallel: {micro_batch_size: 4}
"""


def grid(tmp_path, section, base=BASE):
    path = tmp_path / "g.yaml"
    path.write_text(f"{base}\ngrid:\n{section}")
    return load_grid(path)


def names(found):
    return [m.name for m in found.members]


def test_every_combination_once(tmp_path):
    found = grid(
        tmp_path, '  optimizer.lr: [1e-3, 3e-4]\n  seed: [0, 1, 2]\n  model.pattern: ["gdn"]'
    )
    assert names(found) == [
        f"lr={lr},seed={seed}" for lr in ("0.001", "0.0003") for seed in (0, 1, 2)
    ]
    member = found.members[4]
    assert (member.config.optimizer.lr, member.config.seed) == (3e-4, 1)
    assert member.config.model.pattern == "gdn", "also of an axis with one value"
    assert member.config.run_directory == Path("runs/g/lr=0.0003,seed=1")
    assert member.config.name == "g-lr=0.0003,seed=1"


def test_names_do_not_depend_on_the_order(tmp_path):
    one = grid(tmp_path, "  seed: [0, 1]\n  optimizer.lr: [1e-3, 3e-4]")
    other = grid(tmp_path, "  optimizer.lr: [3e-4, 1e-3]\n  seed: [1, 0]")
    assert sorted(names(one)) == sorted(names(other))
    by_name = {m.name: (m.config.seed, m.config.optimizer.lr) for m in one.members}
    assert by_name == {m.name: (m.config.seed, m.config.optimizer.lr) for m in other.members}


def test_zip_labels_exclude_include(tmp_path):
    found = grid(
        tmp_path,
        "  zip: {optimizer.lr: [1e-3, 3e-4], schedule.warmup_steps: [2, 4]}\n"
        '  model.pattern: {pure: "4*gdn", hybrid: "2*(gdn attn)"}\n'
        "  exclude: [{model.pattern: pure, optimizer.lr: 3e-4}]\n"
        "  include: [{model.pattern: hybrid, seed: 7}]",
    )
    assert names(found) == [
        "pattern=pure,lr=0.001,warmup_steps=2",
        "pattern=hybrid,lr=0.001,warmup_steps=2",
        "pattern=hybrid,lr=0.0003,warmup_steps=4",
        "pattern=hybrid,seed=7",
    ]
    assert [m.config.schedule.warmup_steps for m in found.members] == [2, 2, 4, 2]
    assert found.members[3].config.model.pattern == "2*(gdn attn)"


def test_whole_sections_and_what_is_in_them(tmp_path):
    found = grid(
        tmp_path,
        "  model.mixers.gdn.head_dim: [4, 8]\n  model.mixers.gdn: [{num_heads: 1}, {num_heads: 4}]",
    )
    settings = [m.config.model.mixers["gdn"] for m in found.members]
    assert settings == [{"num_heads": heads, "head_dim": dim} for dim in (4, 8) for heads in (1, 4)]


def test_long_names_are_cut_and_stay_different(tmp_path):
    patterns = ", ".join(f'"{n}*gdn ' + "attn gdn " * 12 + '"' for n in (1, 2, 3))
    found = grid(tmp_path, f"  model.pattern: [{patterns}]")
    assert len(set(names(found))) == 3
    assert all(len(n) <= 80 for n in names(found))


def test_without_a_grid_it_is_one_run(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text(BASE)
    (member,) = load_grid(path, ["seed=3"]).members
    assert (member.name, member.config.seed) == ("", 3)
    assert member.config.run_directory == Path("runs/g")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("  modle.pattern: [gdn]", r"unknown setting 'modle' \(did you mean 'model'"),
        ("  optimizer.lrr: [1, 2]", "member .*unknown setting 'optimizer.lrr'"),
        ("  optimizer.lr: [1e-3, -1]", "member lr=-1: optimizer.lr is -1"),
        ("  optimizer.lr: 1e-3", "grid.optimizer.lr is 0.001, expected a list"),
        ("  seed: []", "grid.seed is empty"),
        ("  model.pattern: [gdn, nothing]", "member pattern=nothing"),
        ("  seed: [0, 0]", "two members of the grid are named"),
        (
            "  zip: {seed: [0, 1], optimizer.lr: [1e-3]}",
            "different lengths: seed 2, optimizer.lr 1",
        ),
        ("  seed: [0]\n  exclude: [{seed: 0}]", "grid has no members; add axes or include"),
        ("  seed: [0]\n  exclude: [3]", "grid.exclude has 3"),
        (
            "  seed: [0, 1]\n  exclude: [{sead: 0}]",
            r"grid.exclude has sead \(did you mean 'seed'\?\).* its axes: seed",
        ),
        ("  seed: [0, 1]\n  exclude: [{seed: 2}]", "matches no member.*seed: 0, 1"),
        (
            "  seed: [0, 1]\n  model.pattern: {pure: gdn}\n"
            "  exclude: [{seed: 0}, {seed: 0, model.pattern: mixed}]",
            "'model.pattern': 'mixed'}, which matches no member.*model.pattern: pure",
        ),
        ("  name: [a, b]", "grid has an axis 'name'"),
        ("  zip: {directory: [a, b], seed: [0, 1]}", "grid has an axis 'directory'"),
        ("  seed: [0]\n  include: [{grid: a}]", "grid has an axis 'grid'"),
        ("  extends: [a.yaml]", "grid has an axis 'extends'"),
        ("  seed: [0, 1]\n  match: watts", "grid.match is 'watts', expected one of"),
        ("  {}", "expected axes"),
        ("  train.global_batch_tokens: [64, 65]", "member global_batch_tokens=65: train"),
    ],
)
def test_what_cannot_run_is_refused_as_a_whole(tmp_path, section, message):
    with pytest.raises(ConfigError, match=message):
        grid(tmp_path, section)


def test_a_grid_is_refused_before_it_fills_the_memory(tmp_path):
    axes = ("seed", "optimizer.lr", "schedule.warmup_steps", "train.steps")
    section = "\n".join(f"  {axis}: {list(range(1, 101))}" for axis in axes)
    with pytest.raises(ConfigError, match=r"100,000,000 members, 100 x 100 x 100 x 100 by its axe"):
        grid(tmp_path, section)
    included = ", ".join(f"{{seed: {n}}}" for n in range(1001))
    with pytest.raises(ConfigError, match=r"1,001 members, .* 1001 by include"):
        grid(tmp_path, f"  include: [{included}]")


SECTION_AXIS = (
    "  model.mixers.cell: {one: {kind: gdn, num_heads: 1}, two: {kind: gdn, num_heads: 2}}"
)


@pytest.mark.parametrize(
    ("section", "override"),
    [
        ("  optimizer.lr: [1e-3, 3e-4]", "optimizer.lr=5e-3"),
        ("  optimizer.lr: [1e-3]", "--optimizer.lr=5e-3"),
        ("  optimizer.lr: [1e-3, 3e-4]", "optimizer={lr: 5e-3}"),
        ("  zip: {optimizer.lr: [1e-3, 3e-4], seed: [0, 1]}", "seed=3"),
        ("  include: [{seed: 1}, {seed: 2}]", "seed=3"),
        (SECTION_AXIS, "model.mixers.cell.num_heads=4"),
        (SECTION_AXIS, "model.mixers={cell: {num_heads: 4}}"),
    ],
)
def test_an_override_of_what_an_axis_sets_is_refused(tmp_path, section, override):
    path = tmp_path / "g.yaml"
    path.write_text(f"{BASE}\ngrid:\n{section}")
    load_grid(path)
    with pytest.raises(ConfigError, match=r"replaces what the grid's axis .* sets"):
        load_grid(path, [override])


def test_overrides_of_everything_else_reach_all_members(tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text(f"{BASE}\ngrid:\n{SECTION_AXIS}\n  optimizer.lr: [1e-3, 3e-4]\n")
    found = load_grid(
        path, ["model.mixers.cell.head_dim=4", "optimizer.weight_decay=0.5", "seed=3"]
    )
    assert names(found) == [f"cell={n},lr={lr}" for n in ("one", "two") for lr in (0.001, 0.0003)]
    for member in found.members:
        config = member.config
        assert (config.seed, config.optimizer.weight_decay) == (3, 0.5)
        assert config.model.mixers["cell"]["head_dim"] == 4
    assert names(load_grid(path, ["grid.match=tokens"])) == names(found)
    with pytest.raises(ConfigError, match=r"the axis optimizer.lr is set in a file alone"):
        load_grid(path, ["grid.optimizer.lr=[5e-3]"])


def test_a_grid_replaces_that_of_the_file_it_extends(tmp_path):
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(
            f"{BASE}\ngrid:\n  optimizer.lr: [1e-3, 3e-4]\n  match: tokens\n"
        )
    child = tmp_path / "child.yaml"
    child.write_text("extends: first.yaml\nname: c\ngrid: {seed: [0, 1]}\n")
    found = load_grid(child)
    assert (names(found), found.match) == (["seed=0", "seed=1"], None)
    child.write_text("extends: first.yaml\nname: c\nseed: 5\n")
    found = load_grid(child)
    assert names(found) == ["lr=0.001", "lr=0.0003"], "as it is where there is none of its own"
    assert {m.config.seed for m in found.members} == {5}
    (tmp_path / "second.yaml").write_text(f"{BASE}\ngrid: {{seed: [7, 8]}}\n")
    child.write_text("extends: [first.yaml, second.yaml]\nname: c\n")
    assert names(load_grid(child)) == ["seed=7", "seed=8"], "of several files, the last one's"
    child.write_text("extends: first.yaml\nname: c\ngrid: {exclude: [{optimizer.lr: 1e-3}]}\n")
    with pytest.raises(ConfigError, match=r"optimizer\.lr, which is no axis of the grid"):
        load_grid(child)


PATTERNS = '  model.pattern: {gdn: "4*gdn", attn: "4*attn", more: "40*(gdn attn)"}\n'


def test_members_made_alike_in_parameters(tmp_path):
    found = grid(tmp_path, '  model.pattern: {gdn: "4*gdn", attn: "4*attn"}\n  match: parameters')
    sizes = [counts_of(m.config).parameters for m in found.members]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert found.members[0].config.model.mlp.intermediate_size is None, "the first is the measure"
    with pytest.raises(ConfigError, match="but the closest MLP width"):
        grid(tmp_path, PATTERNS + "  match: parameters")
    with pytest.raises(ConfigError, match="has no MLP to resize"):
        grid(tmp_path, "  model.mlp.kind: [swiglu, none]\n  match: parameters")


def test_members_made_alike_in_flops_and_tokens(tmp_path):
    base = BASE.replace("steps: 10", "steps: 1000")
    with pytest.raises(ConfigError, match=r"counts the vocabulary too.*set model\.vocab_size"):
        grid(tmp_path, PATTERNS + "  match: flops", base)
    base = base.replace("hidden_size: 32", "hidden_size: 32, vocab_size: 64")
    found = grid(tmp_path, PATTERNS + "  match: flops", base)
    flops = [
        counts_of(m.config).training_flops()
        * m.config.train.tokens_before(m.config.train.num_steps)
        for m in found.members
    ]
    assert flops == pytest.approx([flops[0]] * 3, rel=0.01)
    assert found.members[2].config.train.num_steps < 100
    found = grid(tmp_path, "  train.steps: [10, 20]\n  match: tokens", BASE)
    assert [m.config.train.num_steps for m in found.members] == [10, 10]


def budget(tmp_path, tokens, batch, how="tokens", ratio=1.0):
    """Tokens of the second of two members, of which the first has so many; None if refused."""
    base = BASE.replace("steps: 10", f"tokens: {tokens}") + f"directory: {tmp_path}\n"
    axes = f'  zip: {{train.global_batch_tokens: [64, {batch}], model.pattern: [gdn, "2*gdn"]}}\n'
    write_throughput(
        tmp_path,
        {"pattern=gdn,global_batch_tokens=64": 1.0}
        | {f"pattern=2xgdn,global_batch_tokens={batch}": ratio},
    )
    try:
        found = grid(tmp_path, f"{axes}  match: {how}", base)
    except ConfigError as error:
        return None, str(error)
    train = found.members[1].config.train
    return train.tokens_before(train.num_steps), ""


def numbers_of(words, message):
    (number,) = re.findall(words + r" ([\d,]+)", message)
    return int(number.replace(",", ""))


@pytest.mark.parametrize("how", ["tokens", "time"])
def test_budgets_are_within_one_percent_or_refused_with_what_would_work(tmp_path, how):
    generator = random.Random(0)
    refused = 0
    for _ in range(40):
        tokens, batch = 64 * generator.randint(20, 2000), 64 * generator.randint(1, 200)
        ratio = 1.0 if how == "tokens" else generator.uniform(0.2, 5)
        wanted = ratio * tokens
        reached, message = budget(tmp_path, tokens, batch, how, ratio)
        nearest = min(
            (n * batch for n in (int(wanted / batch), int(wanted / batch) + 1) if n),
            key=lambda n: abs(n - wanted),
        )
        if abs(nearest / wanted - 1) <= 0.01:
            assert reached == nearest
            continue
        refused += 1
        assert f"grid.match is {how}" in message and f"{nearest:,}" in message
        smaller = numbers_of("global_batch_tokens of at most", message) // 64 * 64
        if smaller:
            assert budget(tmp_path, tokens, smaller, how, ratio)[0] is not None
        longer = numbers_of("a first member of at least", message)
        assert budget(tmp_path, -(-longer // 64) * 64, batch, how, ratio)[0] is not None
    assert 5 < refused < 40


def test_a_batch_of_almost_the_whole_budget_is_no_match(tmp_path):
    reached, message = budget(tmp_path, 67_584, 65_536)
    assert reached is None
    assert "as many tokens as the first member's 67,584, but the nearest number" in message


def test_members_made_alike_in_time(tmp_path):
    base = BASE.replace("steps: 10", "steps: 1000") + f"directory: {tmp_path}\n"
    section = '  model.pattern: {gdn: "4*gdn", attn: "4*attn"}\n  match: time'
    with pytest.raises(ConfigError, match="no tokens per second of pattern=gdn, pattern=attn; run"):
        grid(tmp_path, section, base)
    write_throughput(tmp_path, {"pattern=gdn": 100.0, "pattern=attn": 250.0})
    found = grid(tmp_path, section, base)
    assert [m.config.train.num_steps for m in found.members] == [1000, 2500]


def check_trunk(branches):
    (trunk,) = load_grid(ROOT / "configs/runs/trunk.yaml").members
    kept, count = trunk.config.kept_steps, trunk.config.train.num_steps
    assert kept == {m.config.first_step for m in branches.members}
    for member in branches.members:
        assert Path(member.config.branch.run) == trunk.config.run_directory
        assert member.config.train.num_steps == count, "to the same end"


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.stem)
def test_grids_that_come_with_the_project(path):
    found = load_grid(path)
    assert len(found.members) >= (3 if path.stem == "decays" else 5)
    assert found.name == path.stem
    for member in found.members:
        block_specs(member.config.model, member.name)
    if path.stem == "decays":  # of configs/runs/trunk.yaml, which keeps what they need
        check_trunk(found)
    elif path.stem == "loss-curves-tiny":  # for fits, after no paper
        assert {m.config.schedule.kind for m in found.members} == {"cosine", "wsd", "two_stage"}
    elif path.stem == "convert-tiny":  # what to take of a teacher, after no paper
        assert {m.config.train.num_steps for m in found.members} == {40, 120}
        teachers = {m.config.distill and m.config.distill.teacher for m in found.members}
        assert teachers == {None, "runs/convert-teacher"}
    elif path.stem.endswith("-tiny"):
        steps = sum(m.config.train.num_steps for m in found.members)
        assert steps <= 500, "minutes on a CPU"
        assert (path.parent / path.name.replace("-tiny", "")).exists()
    else:
        assert "Reported" in path.read_text()
        study = path.stem.removesuffix("-340m")  # of two sizes, with one tiny version
        assert path.with_name(f"{study}-tiny.yaml").exists()


def test_grids_are_alike_in_what_they_say():
    for name, size, tokens in (("hybrid-ratio", 1.3e9, 100e9), ("hybrid-ratio-340m", 3.4e8, 20e9)):
        found = load_grid(ROOT / f"configs/grids/{name}.yaml")
        sizes = [counts_of(m.config).parameters for m in found.members]
        assert max(sizes) / min(sizes) < 1.01
        assert sizes[0] == pytest.approx(size, rel=0.15)
        config = found.members[0].config
        assert config.train.num_steps * config.train.global_batch_tokens == pytest.approx(tokens)
        assert {"niah_single_1", "recall_squad"} <= set(config.eval.tasks)
        patterns = {m.name.split("pattern=")[1]: m.config.model.pattern for m in found.members}
        for ratio in (24, 12, 6, 3):
            pattern = parse_pattern(patterns[f"{ratio}to1"], ["linear", "attn"])
            attention = pattern.count("attn")
            assert (len(pattern) - attention) // attention in (ratio, ratio - 1, ratio + 1)
        assert "pure" in patterns
    state = load_grid(ROOT / "configs/grids/state-size.yaml")
    for member in state.members:  # the names say the state's size, in numbers per layer
        (spec, *_) = block_specs(member.config.model)
        d = member.config.model.hidden_size
        size = spec.mixer.state_bytes(spec.config, d, 4096) // 4
        named = int(member.name.rsplit("-", 1)[1])
        assert named <= size <= named * 1.2 + 6000, (member.name, size)  # and the convolutions'


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("  optimizer: [{lr: 1e-3}, {lr: 2e-3}]\n  optimizer.lr: [5e-3, 6e-3]", "set the same"),
        ("  seed: [1, 2]\n  zip: {seed: [3, 4], optimizer.lr: [1e-3, 2e-3]}", "set the same"),
        ("  zip: 3", "grid.zip is 3, expected axes of equal length"),
    ],
)
def test_axes_that_cannot_be_together_are_refused(tmp_path, section, words):
    with pytest.raises(ConfigError, match=words):
        grid(tmp_path, section)


def test_an_index_in_brackets_is_the_same_setting(tmp_path):
    blend = BASE.replace("{path: nowhere}", "{blend: [{path: a}, {path: b}]}")
    path = tmp_path / "g.yaml"
    path.write_text(f"{blend}\ngrid:\n  data.blend[0].weight: [1, 2]")
    assert [m.config.data.blend[0].weight for m in load_grid(path).members] == [1, 2]
    for name in ("data.blend.0.weight", "data.blend[0].weight", "data.blend"):
        with pytest.raises(ConfigError, match="replaces what the grid's axis"):
            load_grid(path, [f"{name}=7"])
