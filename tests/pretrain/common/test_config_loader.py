from dataclasses import dataclass
from typing import Any, Literal

import pytest

from pretrain.common.config_loader import (
    Config,
    ConfigError,
    load_config,
    setting,
    to_yaml,
    validate,
)


@dataclass
class Inner(Config):
    rate: float = setting(0.1, above=0)
    tags: list[str] = setting(factory=list)


@dataclass
class Outer(Config):
    name: str
    count: int = setting(3, minimum=1, maximum=10)
    inner: Inner = setting(factory=Inner)
    extra: dict[str, int] | None = None
    kind: Literal["small", "large"] = "small"


def load(folder, text, *overrides):
    path = folder / "a.yaml"
    path.write_text(text)
    return load_config(Outer, path, overrides)


def test_files_extend_others_and_overrides_come_last(tmp_path):
    (tmp_path / "base.yaml").write_text("name: base\ncount: 5\ninner: {rate: 2}\n")
    config = load(tmp_path, "extends: base.yaml\nname: mine\n", "inner.tags=[x]", "count=1e1")
    assert config == Outer("mine", 10, Inner(2.0, ["x"]))
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert load_config(Outer, tmp_path / "written.yaml") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("count: 3", "name must be set"),
        ("name: x\ncuont: 3", "unknown setting 'cuont' .did you mean 'count'"),
        ("name: x\ncount: 1.5", "count is 1.5, expected a whole number"),
        ("name: x\ncount: true", "count is True, expected a whole number"),
        ("name: x\ncount: 11", "count is 11, expected at most 10"),
        ("name: x\ninner: {rate: .nan}", "inner.rate is nan, expected a finite number"),
        ("name: x\ninner: 3", "inner is 3, expected a mapping with: rate, tags"),
        ("name: x\nextra: {a: b}", "extra.a is 'b', expected a whole number"),
        (
            "name: x\nkind: lagre",
            "kind is 'lagre' .did you mean 'large'.*expected one of: small",
        ),
        ("name: x\nkind: 3", "kind is 3, expected text"),
        ("extends: a.yaml", "extends itself"),
        ("extends: nope.yaml", "no config file at"),
        ("name: [", "not valid YAML"),
        ("- name", "expected a mapping of settings at the top"),
        ("name: 12", "name is 12, expected text: put it in quotes"),
        ("extends: 3", "extends is 3, expected a file or a list of files"),
        ("extends: [{a: b}]", "expected a file or a list of files"),
        ("just text", "expected a mapping of settings at the top, found the value 'just text'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words) as error:
        load(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": 3}, "Outer: name is 3, expected text"),
        ({"name": "x", "count": "many"}, "Outer: count is 'many', expected a whole number"),
        ({"name": "x", "count": 11}, "Outer: count is 11, expected at most 10"),
        ({"name": "x", "inner": {"rate": 0}}, "Outer: inner.rate is 0.0, expected more than 0"),
        ({"name": "x", "kind": "lagre"}, r"Outer: kind is 'lagre' \(did you mean 'large'\?\)"),
    ],
)
def test_configs_made_in_python_are_checked_by_the_same_code(values: dict[str, Any], words):
    with pytest.raises(ConfigError, match=words):
        Outer(**values)


def test_what_is_changed_later_is_checked_when_asked():
    config = Outer("x", count=2.0)  # type: ignore[arg-type]
    assert isinstance(config.count, int)
    config.inner.rate = -1
    with pytest.raises(ConfigError, match=r"^run: inner.rate is -1.0, expected more than 0$"):
        validate(config, "run")
