"""YAML as settings are read and written: plain scalars mean what YAML 1.2 says, or are text.

YAML 1.1, PyYAML's own, takes ``010`` for 8, ``1:30`` for 90, ``no`` for false and a date for a
date. Here they are text, which a setting that wants a number then refuses. Keys are always text.
What is written is read back the same, by this reader and by one of YAML 1.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

LARGEST_FILE = 4_000_000  # bytes; a file of settings has some thousand, and reading takes time
_TOO_DEEP = "lists and mappings lie too deep in each other, or in themselves; expected settings"
_MOST_VALUES = 1_000_000  # of a file whose anchors are written out
# Without leading zeros and colons, which readers take for different things; 10_000 is 10000 to all.
_WHOLE = r"(0|[1-9][0-9]*(_[0-9]+)*)"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (rf"[-+]?{_WHOLE}|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        rf"[-+]?(\.[0-9]+|{_WHOLE}(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own declaration)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping whose keys are the text that is written; refuse a key given twice."""
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, (key, _) in enumerate(node.value):
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="found a list or mapping as a key, expected a name",
                    problem_mark=key.start_mark,
                )
            if key.value in written[:place]:
                raise yaml.MarkedYAMLError(
                    problem=f"found '{key.value}' twice", problem_mark=key.start_mark
                )
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


class _Dumper(yaml.SafeDumper):
    pass


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 0)


for _name, (_pattern, _first) in _SCALARS.items():
    _tag, _expression = f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z")
    _starts = [*_first, ""] if _name == "null" else list(_first)
    _Loader.add_implicit_resolver(_tag, _expression, _starts)
    _Dumper.add_implicit_resolver(_tag, _expression, _starts)  # beside those of YAML 1.1
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:merge", lambda _, node: node.value)  # where no key
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_file(path: Path) -> Any:
    """Return the values of a YAML file, None where it is empty.

    Raises ValueError, whose words complete a sentence that begins with the file's name.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(
                f"has {size / 1e6:,.0f} MB, expected a file of settings, of at most "
                f"{LARGEST_FILE / 1e6:.0f} MB"
            )
        return parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def parse(text: str) -> Any:
    """Return the values of a YAML document, each list and mapping an object of its own.

    Raises ValueError, whose words say what is wrong and where.
    """
    return _loaded(lambda: _Loader(text).get_single_data())


def parse_value(text: str) -> Any:
    """Return what a value on the command line means.

    What begins as a list, a mapping or quoted text is read as that. Everything else is one scalar
    as it is written: ``a # b`` and ``a: b`` are text. Raises ValueError as :func:`parse` does.
    """
    if text[:1] in ("[", "{", "'", '"'):
        return _loaded(lambda: _whole_value(text))
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return _loaded(lambda: loader.construct_document(yaml.ScalarNode(tag, text)))


def quoted(text: str) -> str:
    """Return the value on the command line that means this text, whatever it looks like."""
    return yaml.dump(text, default_style='"', width=math.inf).rstrip("\n")


def dump(values: dict[str, Any]) -> str:
    """Return plain values as YAML text, in ASCII; every string is read back as itself."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def _whole_value(text: str) -> Any:
    loader = _Loader(text)
    node = loader.get_single_node()
    if node is None:  # not of text that begins as this does
        return None
    end = node.end_mark.index
    if text[end:].strip():
        raise ValueError(
            f"not valid YAML: '{text[end:].strip()}' follows the end of the "
            f"{'text in quotes' if isinstance(node, yaml.ScalarNode) else 'brackets'}; quote the "
            "text as a whole"
        )
    return loader.construct_document(node)


def _loaded(load: Callable[[], Any]) -> Any:
    try:
        found = load()
    except (KeyError, AttributeError, TypeError) as error:  # PyYAML's, of a tag such as !!bool x
        raise ValueError(f"not valid YAML: a value does not fit its tag ({error})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {_words(error)}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    try:
        return _copied(found, [_MOST_VALUES])
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def _copied(value: Any, left: list[int]) -> Any:
    """Return a copy in which an anchor's value is another object wherever it is named."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"more than {_MOST_VALUES:,} values, expected settings")
    if isinstance(value, dict):
        return {key: _copied(element, left) for key, element in value.items()}
    if isinstance(value, list):
        return [_copied(element, left) for element in value]
    return value


def _words(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    said = " ".join(str(part) for part in (error.context, error.problem) if part)
    return said if mark is None else f"{said}, in line {mark.line + 1}, column {mark.column + 1}"
