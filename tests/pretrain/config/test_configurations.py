"""The configurations that come with the project are what they say they are."""

from pathlib import Path

import pytest
import yaml

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, load_run_config
from pretrain.model.counts import count_model
from pretrain.model.layout import check_tensor_parallel
from pretrain.model.spec import block_specs
from pretrain.model.stages import split_into_stages

CONFIGS = Path(__file__).parents[3] / "configs"
SIZES = {"410m": 410e6, "1b": 1e9, "3b": 3e9, "3.5b": 3.5649e9, "7b": 7e9, "7b-a1b": 6.95e9}
MODELS = sorted(p for p in CONFIGS.glob("models/*/*.yaml"))
RUNS = sorted(CONFIGS.glob("runs/published/*.yaml"))
FAMILIES = {
    "transformer",
    "gdn-hybrid-3to1",
    "gdn-hybrid-7to1",
    "hgrn2-hybrid-6to1",
    "delta-product",
    "m2rnn",
    "m2rnn-hybrid",
    "gdn-hybrid-one-m2rnn",
    "para-gru",
    "para-lstm",
    "recursive-relaxed-2x",
    "rat",
}
# Parameters that a published name promises.
PUBLISHED = {
    **{"410m": 410e6, "805m": 805e6, "1b": 1e9, "1.3b": 1.3e9, "1.7b": 1.7e9},
    **{"3.5b": 3.5649e9, "7b": 7e9},
}


def counted(path):
    model = build_config(ModelConfig, yaml.safe_load(path.read_text())["model"], str(path))
    assert model.vocab_size is not None
    return model, count_model(model, model.vocab_size, 4096)


@pytest.mark.parametrize("size", ["410m", "1b", "3b", "7b", "7b-a1b"])
def test_every_family_is_there(size):
    assert {p.stem for p in (CONFIGS / "models" / size).glob("*.yaml")} >= FAMILIES


@pytest.mark.parametrize("path", MODELS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_models_have_the_size_they_are_named_for(path):
    model, counts = counted(path)
    size = SIZES[path.parent.name]
    # Within 1 % of the size named, so within 2 % of each other.
    assert counts.parameters == pytest.approx(size, rel=0.011)
    text = path.read_text()
    said = float(text.split()[1].rstrip("BM")) * (1e9 if "B " in text[:12] else 1e6)
    assert counts.parameters == pytest.approx(said, rel=0.006)
    assert len(text.splitlines()) < 30
    published = {"recurrent-depth": 55, "7b-a1b": 3 * ("gdn" in path.stem)}  # heads
    if not published.get(path.stem, published.get(path.parent.name)):
        check_tensor_parallel(model, 2, str(path))
    if model.recursion is None:
        split_into_stages(model, model.vocab_size, 4096, 4, str(path))


def test_seven_billion_fit_eight_processes():
    # ParaRNN has four heads as published, RAT two groups of queries and keys.
    for family in FAMILIES - {"para-gru", "para-lstm", "rat"}:
        path = CONFIGS / "models/7b" / f"{family}.yaml"
        check_tensor_parallel(counted(path)[0], 8, str(path))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_published_runs(path):
    config = load_run_config(path)
    assert config.name == path.stem
    block_specs(config.model, str(path))
    size = PUBLISHED[path.stem.split("-")[-1]]
    assert config.model.vocab_size is not None
    counts = count_model(config.model, config.model.vocab_size, config.train.seq_len)
    without = counts.parameters - config.model.vocab_size * config.model.hidden_size * (
        not config.model.tie_embeddings
    )
    # Papers name their models loosely, some by one of two embeddings.
    assert min(abs(counts.parameters / size - 1), abs(without / size - 1)) < 0.1
    plan = config.plan
    rates = [plan.learning_rate(step) for step in (0, plan.num_steps - 1)]
    assert rates[0] < config.optimizer.lr and rates[1] <= config.optimizer.lr
    assert "Reported" in path.read_text()
