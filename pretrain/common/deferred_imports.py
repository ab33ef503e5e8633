"""Imports by another library that wait until what they name is first used."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Union


class _Deferred:
    """A class or function of a module, or a module, in the one that has imported it by name.

    It does what the real one does, and is replaced by that when it is first used.
    """

    def __init__(self, module: str, name: str, defined_in: str, importer: dict[str, Any]):
        self._module, self._name, self._defined_in = module, name, defined_in
        self._importer = importer

    def _real(self) -> Any:
        real: Any = importlib.import_module(self._module)
        if self._name:
            real = getattr(real, self._name)
        for name, value in list(self._importer.items()):
            if value is self:
                self._importer[name] = real
        return real

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what typing asks of every annotation
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __instancecheck__(self, instance: Any) -> bool:
        # No object is of a class whose module nobody has imported.
        return self._defined_in in sys.modules and isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._defined_in in sys.modules and issubclass(subclass, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007


# Of the blocks of all threads: who imports, and the modules, each with the one that defines.
_scopes: list[tuple[tuple[str, ...], Mapping[str, str]]] = []
_lock = threading.Lock()
_ordinary: Any = builtins.__import__


def _import(
    name: str,
    globals: dict[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    if fromlist and globals is not None and "*" not in fromlist:
        who = f"{globals.get('__name__')}."
        for importers, modules in list(_scopes):
            if who.startswith(importers):
                package = globals.get("__package__") or ""
                full = importlib.util.resolve_name("." * level + name, package)
                found = {}
                for each in fromlist:
                    module = f"{full}.{each}"
                    if full in modules and full not in sys.modules:
                        found[each] = _Deferred(full, each, modules[full], globals)
                    elif module in modules and module not in sys.modules:
                        found[each] = _Deferred(module, "", module, globals)
                if len(found) == len(fromlist):
                    return SimpleNamespace(**found)
    return _ordinary(name, globals, locals, fromlist or (), level)


@contextlib.contextmanager
def deferred_imports(importers: Sequence[str], modules: Mapping[str, str]) -> Iterator[None]:
    """Defer what modules of ``importers``, packages, import from ``modules`` by name.

    A module is imported when something of it is called, asked for an attribute, derived from, or
    may be the class of an object. ``modules``: each with the module that defines its classes,
    usually itself. Nobody else sees any of it: ``sys.modules`` does not change, what has been
    imported already is taken as it is, and all other modules import as always.
    """
    global _ordinary  # noqa: PLW0603
    scope = (tuple(f"{importer}." for importer in importers), modules)
    with _lock:
        if not _scopes:
            _ordinary = builtins.__import__
            builtins.__import__ = _import  # type: ignore[assignment]
        _scopes.append(scope)
    try:
        yield
    finally:
        with _lock:
            _scopes.remove(scope)
            if not _scopes:
                builtins.__import__ = _ordinary
