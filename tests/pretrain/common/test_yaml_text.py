"""What is written is read back the same; what looks like a number to some reader is not guessed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from pretrain.common.config_loader import Config, ConfigError, load_config, setting, to_yaml
from pretrain.common.yaml_text import LARGEST_FILE, dump, parse, parse_value, quoted

# Texts of characters of numbers, dates and YAML's own, beside texts of any characters.
YAMLS_OWN = "0123456789+-._:eExXob~<=#&*!|>%@`'\"[]{},?yn \n\t\\$"
TEXTS = st.text(max_size=40) | st.text(YAMLS_OWN, max_size=12)
SPELT = [
    *("7e3", "1e5", "010", "0o17", "0x1F", "0b1", "1_000", "1:30", "1:30:00.5", "+.5", "5."),
    *("yes", "No", "on", "y", "true", "~", "null", "", " ", ".inf", "-.NaN", "2001-01-01", "<<"),
    *("=", "${x}", "\\${x}", "???", "a # b", "a: b", "- a", "*a", "&a", "!a", "|", "%", "@"),
    *(
        "\x85",
        "\ufeff",
        "\ud800",
        "\u2028",
        "\x00",
        "a\r\nb",
        "---",
        "...",
        "'",
        '"',
        "x: {",
        "é漢",
    ),
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


# Ten times as many values in every line.
LAUGHS = "a0: &a0 1\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@dataclass
class Settings(Config):
    name: str
    tags: list[str] = setting(factory=list)
    table: dict[str, str] = setting(factory=dict)
    rate: float | None = None
    count: int | None = None


def override(folder, *given: str) -> Settings:
    (folder / "a.yaml").write_text("name: x\n")
    return load_config(Settings, folder / "a.yaml", given)


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
@example({text: text for text in SPELT})
def test_everything_written_is_read_back(values: dict[str, Any]):
    assert parse(dump(values)) == values


@given(TEXTS)
@example("7e3")
def test_text_is_text_to_readers_of_yaml_1_1_too(text: str):
    written = dump({"name": text, "tags": [text]})
    assert yaml.safe_load(written) == {"name": text, "tags": [text]}
    assert written.isascii()


@pytest.mark.parametrize("text", SPELT)
def test_a_run_with_that_name_is_the_same_when_it_is_read_again(tmp_path, text):
    config = Settings(text, [text], {text: text})
    (tmp_path / "config.yaml").write_bytes(to_yaml(config).encode())
    assert load_config(Settings, tmp_path / "config.yaml") == config


@given(TEXTS)
def test_an_override_in_quotes_is_its_text(tmp_path_factory, text: str):
    folder = tmp_path_factory.getbasetemp()
    found = override(folder, f"name={quoted(text)}", f"tags=[{quoted(text)}]")
    assert (found.name, found.tags) == (text, [text])


@given(TEXTS)
@example("a # b")
@example("a: b")
def test_an_override_is_read_as_written_or_refused(text: str):
    try:
        found = parse_value(text)
    except ValueError:
        assert text[0] in "[{'\""
        return
    if isinstance(found, str):
        assert found == text or text[0] in "'\""
    elif isinstance(found, bool) or found is None:
        assert text.lower() in ("true", "false", "null", "~", "")
    elif not text.lstrip("+-").startswith(("0x", "0o")):
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        assert found == number or (math.isnan(found) and math.isnan(number))


@pytest.mark.parametrize(
    "text", ["010", "1:30", "1__0", "_1", "0b11", "1e3x", "yes", "+-1", "2001-01-01", "1,000", "٣"]
)
def test_what_is_a_number_to_some_readers_alone_is_refused(tmp_path, text):
    for key in ("count", "rate"):
        with pytest.raises(ConfigError, match=rf"{key} is '{text.replace('+', '[+]')}', expected"):
            override(tmp_path, f"{key}={text}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-0", 0),
        ("+12", 12),
        ("0x1F", 31),
        ("0o17", 15),
        ("7e3", 7000),
        ("2.0", 2),
        ("1_000", 1000),
    ],
)
def test_numbers_are_numbers(tmp_path, text, value):
    assert override(tmp_path, f"count={text}", f"rate={text}").count == value


@pytest.mark.parametrize("text", ["7e3", "12", "true", "1.5"])
def test_a_number_as_a_name_is_refused_with_what_would_do(tmp_path, text):
    with pytest.raises(ConfigError, match="expected text: put it in quotes"):
        override(tmp_path, f"name={text}")
    assert override(tmp_path, f"name='{text}'").name == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name="a" b', "not valid YAML"),
        ('name="a" # b', "'# b' follows the end of the text in quotes"),
        ("tags=[a] # b", "'# b' follows the end of the brackets"),
        ("tags=[a", "not valid YAML"),
        ("table={a: b, a: c}", "found 'a' twice"),
        ("name.x=1", "name is 'x', which has no settings"),
        ("tags.0=1", r"tags is a list of 0, expected a whole list, found tags\.0"),
        ("table=" + "{a: " * 3000, "too deep"),
    ],
)
def test_overrides_that_mean_nothing_are_refused_in_a_sentence(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words) as error:
        override(tmp_path, "tags=[]", text)
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [*x]", "or in themselves"),
        ("[" * 3000, "too deep"),
        ("{a: " * 3000 + "}" * 3000, "too deep"),
        ("a: 1\na: 2", "found 'a' twice, in line 2, column 1"),
        ("? [a]\n: 1", "as a key, expected a name"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: b: c", "line 1, column 5"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        (f"a: {'9' * 5000}", "4300"),
        (LAUGHS, "more than 1,000,000 values"),
    ],
)
def test_files_that_are_no_settings_are_refused_in_a_sentence(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        load_config(Settings, tmp_path / "a.yaml")
    assert len(str(error.value)) < 600


def test_a_file_of_a_size_that_no_settings_have_is_refused(tmp_path):
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(ConfigError, match="has 4 MB, expected a file of settings, of at most 4 MB"):
        load_config(Settings, tmp_path / "a.yaml")


def test_a_folder_is_refused_with_a_file_in_it(tmp_path):
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "one.yaml").write_text("name: x")
    with pytest.raises(ConfigError, match=r"settings is a folder, .* such as .*settings/one\.yaml"):
        load_config(Settings, tmp_path / "settings")


def test_thousands_of_values_are_read(tmp_path):
    values = [f"'{n}'" for n in range(20_000)]
    (tmp_path / "a.yaml").write_text(f"name: x\ntags: [{', '.join(values)}]\n")
    assert len(load_config(Settings, tmp_path / "a.yaml").tags) == 20_000


def test_an_anchor_is_a_copy_wherever_it_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("name: x\ntags: &t [a, b]\ntable: {<<: &u {k: v}, l: w}\n")
    assert load_config(Settings, tmp_path / "a.yaml").table == {"k": "v", "l": "w"}
    values = parse("a: &t [{x: 1}]\nb: *t\n")
    values["a"][0]["x"] = 2
    assert values["b"] == [{"x": 1}]


def test_overrides_reach_into_lists_and_sections_and_keep_the_rest(tmp_path):
    given = ("tags=[a, b]", "tags.1=c", "tags[0]=d", "table.k=v", "table={l: w}")
    found = override(tmp_path, *given)
    assert (found.tags, found.table) == (["d", "c"], {"k": "v", "l": "w"})


def test_a_place_behind_the_end_of_a_list_is_told_with_those_there_are(tmp_path):
    for place in ("2", "-1", "x"):
        with pytest.raises(ConfigError, match=rf"expected tags\.0 to tags\.1, found tags\.{place}"):
            override(tmp_path, "tags=[a, b]", f"tags.{place}=c")


@pytest.mark.parametrize("text", ["!!bool x", "!!timestamp x", "!!int x", "!!float x"])
def test_a_value_that_does_not_fit_its_tag_is_an_error_of_the_text(text):
    with pytest.raises(ValueError, match=r"not valid YAML|invalid|could not"):
        parse(f"a: {text}")
