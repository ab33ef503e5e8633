"""Configuration files: dataclasses are the only schema, YAML and the command line fill them.

A YAML file may start from others (``extends: ../models/base.yaml`` or a list of files, relative to
itself; later ones win). Overrides are dotted: ``optimizer.lr=3e-4``. Anything that the schema does
not know, or whose type or range is wrong, becomes one :class:`ConfigError` sentence. A schema that
derives from :class:`Config` is checked by the same code where it is made in Python.

Files are read in :mod:`pretrain.common.config_files`, which needs yaml and is imported where it is
used: exported models have this without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pretrain.common.errors import ConfigError, UnknownSettingError, nearest, short

# Of what a file says that only its writer can know.
LATER = "a later version of this project has written it: use that one"

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., None])

NULL_ALLOWED = "null allowed"
# A number that may be null until something else determines it; its readers see an int.
Derived = Annotated[int, NULL_ALLOWED]


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Mark text as one of the names in a registry: ``Annotated[str, OneOf(list_names)]``.

    As a Literal whose choices are known only when a value is checked: a new entry of the registry
    is a new choice, without a line where the setting is declared.
    """

    names: Callable[[], Iterable[str]]


class Config:
    """Base of the dataclasses of settings: every check is made when one is made.

    Types and ranges, and then what :func:`check_of` registered for the class. Values are converted
    as those of a YAML file are (``2.0`` to 2 where a whole number belongs). Raises
    :class:`ConfigError`, such as "ModelConfig: hidden_size is -3, expected at least 1".
    """

    # The format of a schema that is saved with the results it belongs to.
    saved_format: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        kind = type(self)
        limits = {item.name: item.metadata for item in dataclasses.fields(cast(Any, kind))}
        for name, hint in field_types(kind).items():
            value = _convert(hint, getattr(self, name), name, kind.__name__)
            _check_limits(value, name, limits[name], kind.__name__)
            object.__setattr__(self, name, value)  # works on frozen dataclasses too
        where, section = _reading.get() or (kind.__name__, "")
        for check in _checks.get(kind, ()):
            check(self, where, section)


_checks: dict[type, list[Callable[[Any, str, str], None]]] = {}
# Where the section that is being read lies: the file, and the section's dotted name with its dot.
_reading: ContextVar[tuple[str, str] | None] = ContextVar("reading", default=None)


def check_of(schema: type) -> Callable[[F], F]:
    """Return a decorator that makes a function check every instance of ``schema`` that is made.

    It is called with the instance, the file or class that messages begin with, and the section's
    name in it, such as ``model.`` (empty at the top); it raises :class:`ConfigError`.
    """

    def register(check: F) -> F:
        _checks.setdefault(schema, []).append(check)
        return check

    return register


_completions: dict[type, list[Callable[[dict[str, Any], str], dict[str, Any]]]] = {}


def completes(
    schema: type,
) -> Callable[[Callable[[dict[str, Any], str], dict[str, Any]]], Callable[..., Any]]:
    """Return a decorator that lets a function complete what a file says of ``schema``.

    It is called with the values, overrides included, and the file that messages begin with, before
    any is checked, and returns them with those that follow from others.
    """

    def register(
        complete: Callable[[dict[str, Any], str], dict[str, Any]],
    ) -> Callable[..., Any]:
        _completions.setdefault(schema, []).append(complete)
        return complete

    return register


def setting(
    default: Any = dataclasses.MISSING,
    *,
    factory: Any = dataclasses.MISSING,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a dataclass field with the range that :func:`validate` checks (``None`` passes)."""
    limits = {
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
    }
    metadata = {key: value for key, value in limits.items() if value is not None}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load_config(
    schema: type[T],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    changes: Mapping[str, Any] | None = None,
    written: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    where: str | None = None,
) -> T:
    """Read ``path`` into ``schema`` and check every field.

    ``changes`` (values by dotted name) and then the ``key=value`` overrides replace what the file
    says; ``written`` is that, where it has been read already. Top-level keys in ``ignore`` are
    skipped, and so is the ``format`` of a schema that is saved with one.

    Raises :class:`ConfigError` naming the file (or ``where``) or field, what was found, and what
    was expected.
    """
    from pretrain.common.config_files import load_values

    values = load_values(path, overrides, changes=changes, written=written)
    where = where or str(path)
    known, mark = getattr(schema, "saved_format", None), None
    if known is not None:
        mark = values.pop("format", None)
        if isinstance(mark, int) and mark > known:
            raise ConfigError(f"{where}: format is {mark}, expected at most {known}: {LATER}")
    kept = {key: value for key, value in values.items() if key not in ignore}
    for complete in _completions.get(schema, ()):
        kept = complete(kept, where)
    try:
        return build_config(schema, kept, where)
    except UnknownSettingError as error:
        if mark is None:  # written by hand
            raise
        raise ConfigError(f"{error}; {LATER}") from None


def build_config(schema: type[T], values: Any, where: str, section: str = "") -> T:
    """Return a checked ``schema`` instance from plain values (dicts, lists, numbers, strings).

    ``section``: the dotted name of the setting that it is, for messages.
    """
    return cast(T, _convert_dataclass(schema, values, section, where))


def validate(instance: Any, where: str) -> None:
    """Check types and ranges of ``instance`` once more, whatever was assigned since it was made.

    Raises :class:`ConfigError` naming ``where`` and the field.
    """
    build_config(type(instance), _plain_values(instance), where)


def field_types(schema: Any) -> dict[str, Any]:
    """Return the annotated type of every field of a dataclass, by name."""
    return _field_types(schema)


@functools.cache
def _field_types(schema: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(schema, include_extras=True)
    return {item.name: hints[item.name] for item in dataclasses.fields(schema)}


def _plain_values(value: Any) -> Any:
    """Return fields by name all the way down, as :func:`dataclasses.asdict` without copying."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain_values(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list):
        return [_plain_values(element) for element in value]
    return value


def to_yaml(instance: Any) -> str:
    """Return a dataclass instance as YAML, every field written out, its format's mark first."""
    from pretrain.common import yaml_text

    mark = getattr(instance, "saved_format", None)
    values = {} if mark is None else {"format": mark}
    return yaml_text.dump({**values, **dataclasses.asdict(instance)})


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _convert(kind: Any, value: Any, name: str, where: str) -> Any:
    """Return ``value`` as the annotated type ``kind``; raise a sentence that names the field."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        if value is None and NULL_ALLOWED in arguments:
            return None
        for mark in arguments[1:]:
            if isinstance(mark, OneOf):
                return _convert_choice(tuple(mark.names()), value, name, where)
        return _convert(arguments[0], value, name, where)
    if origin is Literal:
        return _convert_choice(arguments, value, name, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        (kind,) = (a for a in arguments if a is not types.NoneType)
        return _convert(kind, value, name, where)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, cast(type, kind)):
            return value
        return _convert_dataclass(cast(type, kind), value, name, where)
    if origin is list and isinstance(value, list):
        return [_convert(arguments[0], v, f"{name}[{i}]", where) for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(k): _convert(arguments[1], v, f"{name}.{k}", where) for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is int and isinstance(value, bool):
        raise ConfigError(f"{where}: {name} is {value}, expected a whole number")
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    words = _TYPE_WORDS.get(origin or kind, str(kind))
    if kind is str and isinstance(value, bool | int | float):
        words += ": put it in quotes"
    raise ConfigError(f"{where}: {name} is {short(value)}, expected {words}")


def _convert_choice(choices: tuple[str, ...], value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name} is {short(value)}, expected text")
    if value not in choices:
        raise ConfigError(
            f"{where}: {name} is '{short(value, str)}'{nearest(value, choices)}, "
            f"expected one of: {', '.join(choices)}"
        )
    return value


_TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def _convert_dataclass(schema: type, values: Any, name: str, where: str) -> Any:
    known = [item.name for item in dataclasses.fields(schema)]
    section = name or "the top"
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where}: {section} is {short(values)}, expected a mapping with: {', '.join(known)}"
        )
    dot = f"{name}." if name else ""
    for key in values:
        if key not in known:
            raise UnknownSettingError(
                f"{where}: unknown setting '{dot}{key}'{nearest(str(key), known)}; "
                f"known{f' in {name}' if name else ''}: {', '.join(known)}"
            )
    hints, given = field_types(schema), {}
    for item in dataclasses.fields(schema):
        if item.name in values:
            value = _convert(hints[item.name], values[item.name], f"{dot}{item.name}", where)
            _check_limits(value, f"{dot}{item.name}", item.metadata, where)
            given[item.name] = value
        elif item.default is item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: {dot}{item.name} must be set")
    place = _reading.set((where, dot))
    try:
        return schema(**given)
    finally:
        _reading.reset(place)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_limits(value: Any, name: str, limits: Any, where: str) -> None:
    if value is None:
        return
    several = value.values() if isinstance(value, dict) else value
    for element in several if isinstance(value, list | dict) else [value]:
        if isinstance(element, float) and not math.isfinite(element):
            raise ConfigError(f"{where}: {name} is {value}, expected a finite number")
        for kind, (holds, words) in _LIMITS.items():
            if kind in limits and not holds(element, limits[kind]):
                raise ConfigError(f"{where}: {name} is {value}, expected {words} {limits[kind]:g}")


_LIMITS = {
    "minimum": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "maximum": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}
