from dataclasses import dataclass

import pytest

from pretrain.common.config_loader import ConfigError, load_config, setting, to_yaml


@dataclass
class Inner:
    rate: float = setting(0.1, above=0)
    tags: list[str] = setting(factory=list)  # noqa: RUF009


@dataclass
class Outer:
    name: str
    count: int = setting(3, minimum=1, maximum=10)
    inner: Inner = setting(factory=Inner)  # noqa: RUF009
    extra: dict[str, int] | None = None


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
        ("extends: a.yaml", "extends itself"),
        ("extends: nope.yaml", "no config file at"),
        ("name: [", "not valid YAML"),
        ("- name", "expected a mapping of settings at the top"),
        ("name: ${nope}", "nope"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words) as error:
        load(tmp_path, text)
    assert "\n" not in str(error.value)
