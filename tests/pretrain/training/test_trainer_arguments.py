"""What ``Trainer`` is given: refused in one sentence where it is of no use."""

from __future__ import annotations

import sys

import pytest

import pretrain.__main__
from pretrain import Callback, ConfigError, ModelConfig, RunConfig, Trainer


class Mine(Callback):
    """A callback."""


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"name": "x"}, "a dict"),
        (ModelConfig(hidden_size=8, pattern="attn"), "a ModelConfig"),
        (None, "None"),
        (RunConfig, "the class RunConfig"),
    ],
)
def test_what_is_no_configuration_is_named(config, found):
    with pytest.raises(ConfigError, match=f"config is {found}, expected a RunConfig or the path"):
        Trainer(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("train.steps=2", "overrides is 'train.steps=2', expected a list of strings"),
        ({"train.steps": 2}, "overrides is a dict, expected a list of strings"),
        (None, "overrides is None, expected a list"),
        ([3], "overrides has 3, expected strings"),
    ],
)
def test_overrides_are_a_list_of_strings(run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(run.config, overrides=overrides)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([Mine], r"callbacks has the class Mine, expected an object of it: Mine\(\)"),
        (Mine, "callbacks is the class Mine, expected a list of callbacks"),
        ([3], "callbacks has 3, expected objects of subclasses of pretrain.Callback"),
        ([dict], "callbacks has the class dict, expected objects of"),
        (None, "callbacks is None, expected a list of callbacks"),
        (["Good"], "callbacks names 'Good', expected MODULE.CLASS"),
    ],
)
def test_what_is_no_callback_is_named(run, callbacks, message):
    with pytest.raises(ConfigError, match=f"Trainer: {message}"):
        Trainer(run.config, callbacks=callbacks)


def test_a_callback_is_given_alone_or_by_name(run, tmp_path, monkeypatch):
    (tmp_path / "named_callbacks.py").write_text(
        "from pretrain import Callback\nclass Good(Callback): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    callback = Mine()
    assert Trainer(run.config, callbacks=callback).callbacks[-1] is callback
    for given in ("named_callbacks.Good", ["named_callbacks.Good"]):
        assert type(Trainer(run.config, callbacks=given).callbacks[-1]).__name__ == "Good"


@pytest.mark.parametrize(
    ("arguments", "forced", "overrides"),
    [
        (["seed=3"], False, ["seed=3"]),
        (["--force", "seed=3"], True, ["seed=3"]),
        (["--seed=3", "--force", "name=x"], True, ["--seed=3", "name=x"]),
    ],
)
def test_force_reaches_the_trainer_and_is_no_override(
    run, monkeypatch, arguments, forced, overrides
):
    given = {}

    class Noted(Trainer):
        def __init__(self, config, **arguments):
            given.update(arguments)
            super().__init__(config, **arguments)
            raise KeyboardInterrupt

    monkeypatch.setattr("pretrain.training.trainer.Trainer", Noted)
    monkeypatch.setattr(sys, "argv", ["pretrain", str(run.config), *arguments])
    with pytest.raises(KeyboardInterrupt):
        pretrain.__main__.main()
    assert (given["force"], sorted(given["overrides"])) == (forced, sorted(overrides))
