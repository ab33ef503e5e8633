"""``python -m pretrain.settings_page > docs/settings.md``: every setting, from its dataclass."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pretrain.common.config_loader import NULL_ALLOWED, OneOf, field_types
from pretrain.nn.mixers import registry

HEAD = """# Settings

All settings, their types, defaults and meaning: made from the dataclasses that are the schema, by
`python -m pretrain.settings_page > docs/settings.md`. A file may set any of them, and start from
other files (`extends: other.yaml`, or a list of files of which later ones win); the command line
overrides them by their dotted names (`optimizer.lr=3e-4`). What the schema does not know, or has
another type or range, is refused by a sentence that names it.
"""
# Title, reader, and module and name of the schema. Packages that this one must not depend on are
# named, not imported.
_PAGES = (
    (
        "Training",
        "A run's YAML file, for `python -m pretrain`.",
        "pretrain.config:RunConfig",
    ),
    (
        "Preparing data",
        "A data set's YAML file, for `python -m data_prep`.",
        "data_prep.config:DataPrepConfig",
    ),
    (
        "Launching",
        "A cluster's YAML file, for `python -m launch --cluster`. Grids of runs are described in "
        "[launching](launching.md).",
        "launch.cluster:ClusterConfig",
    ),
    (
        "Deciding",
        "The section `decide` of a file, for `python -m launch decide`, see [decide](decide.md).",
        "launch.decisions.settings:DecideConfig",
    ),
    (
        "Planning",
        "A machine's YAML file, for `python -m pretrain plan --hardware`.",
        "pretrain.planner.hardware:Hardware",
    ),
    (
        "Synthetic tasks",
        "Options of `python -m evals.synthetic` (`--hidden-size 64`), and keys of a suite's runs.",
        "evals.synthetic.settings:SyntheticConfig",
    ),
)
_MIXERS = """
## Mixers

Settings of `model.mixers.NAME`. Where the default of a size is null, it follows the model's width;
run directories have the sizes that this came to.
"""


def schemas() -> list[type]:
    """Return every dataclass of settings that the page describes."""
    found: dict[type, None] = {}
    pending = [_load(path) for _, _, path in _PAGES]
    pending += [mixer.config_class for mixer in registry().values()]
    while pending:
        schema = pending.pop(0)
        found[schema] = None
        pending += [inner for kind in field_types(schema).values() if (inner := _inner(kind))]
    return list(found)


def field_docs(schema: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, in one line, by the field's name.

    A field without such a string is missing.
    """
    found: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        (definition,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    found[name] = " ".join(words.split())
    return found


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for title, reader, path in _PAGES:
        schema = _load(path)
        parts.append(f"\n## {title}\n\n{reader}\n")
        parts += _tables(schema, "")
    parts.append(_MIXERS)
    for name, mixer in sorted(registry().items()):
        parts.append(f"\n### `{name}`: {mixer.card.name}\n\n{_table(mixer.config_class, '')}")
    return "".join(parts)


def _tables(schema: type, prefix: str) -> Iterator[str]:
    """Yield the schema's table, then those of the sections in it."""
    title = f"`{prefix.removesuffix('.')}`" if prefix else "Top level"
    words = " ".join((inspect.getdoc(schema) or "").split())
    yield f"\n### {title}\n\n{words}\n\n{_table(schema, prefix)}"
    for name, kind in field_types(schema).items():
        if inner := _inner(kind):
            listed = "[i]" if typing.get_origin(kind) is list else ""
            yield from _tables(inner, f"{prefix}{name}{listed}.")


def _table(schema: type, prefix: str) -> str:
    docs, kinds = field_docs(schema), field_types(schema)
    rows = ["| setting | type | default | meaning |\n|---|---|---|---|\n"]
    for field in dataclasses.fields(typing.cast(Any, schema)):
        kind = kinds[field.name]
        cells = (
            f"`{prefix}{field.name}`",
            _type(kind) + _range(field.metadata),
            _default(field, kind),
            docs.get(field.name, "").replace("``", "`").replace("|", "\\|"),
        )
        rows.append("| " + " | ".join(cells) + " |\n")
    return "".join(rows)


def _type(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        for mark in arguments:
            if isinstance(mark, OneOf):
                return ", ".join(f"`{choice}`" for choice in mark.names())
        return _type(arguments[0]) + (" or null" if NULL_ALLOWED in arguments else "")
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is types.NoneType else _type(a) for a in arguments)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is list:
        return "list of sections" if _inner(kind) else f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if dataclasses.is_dataclass(kind):
        return "section"
    return {int: "int", float: "float", bool: "bool", str: "text"}[kind]


def _range(limits: Any) -> str:
    signs = {"minimum": "&ge;", "above": "&gt;", "maximum": "&le;", "below": "&lt;"}
    found = [f"{signs[key]} {value:g}" for key, value in limits.items()]
    return f" ({', '.join(found)})" if found else ""


def _default(field: dataclasses.Field[Any], kind: Any) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "must be set"
    if dataclasses.is_dataclass(value):
        return "see below"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`".replace("none", "null")
    if isinstance(value, float) or float in (kind, *typing.get_args(kind)):
        return f"`{value:g}`" if isinstance(value, int | float) else f"`{value}`"
    return f"`{value!r}`" if value == "" else f"`{value}`"


def _inner(kind: Any) -> type | None:
    """Return the dataclass that a field holds, one or a list of them, or None."""
    for part in (kind, *typing.get_args(kind)):
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            return part
    return None


def _load(path: str) -> type:
    module, _, name = path.partition(":")
    schema: type = getattr(importlib.import_module(module), name)
    return schema


if __name__ == "__main__":
    print(page(), end="")
