"""Callbacks by their dotted names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from pretrain.common.config_loader import ConfigError
from pretrain.common.errors import UserError
from pretrain.training.arguments import describe
from pretrain.training.callbacks.base import Callback


def as_callbacks(given: object, where: str) -> list[Callback]:
    """Return ``given``, callbacks or names of their classes, or a single one, as callbacks.

    Raises ConfigError, beginning with ``where``, for anything else.
    """
    several = [given] if isinstance(given, Callback | str) else given
    if not isinstance(several, Iterable):
        raise ConfigError(f"{where} is {describe(given)}, expected a list of callbacks")
    callbacks = []
    for each in several:
        if isinstance(each, type) and issubclass(each, Callback):
            raise ConfigError(
                f"{where} has {describe(each)}, expected an object of it: {each.__name__}()"
            )
        callback = load_callback(each, where) if isinstance(each, str) else each
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"{where} has {describe(callback)}, expected objects of subclasses of "
                "pretrain.Callback, or the names of such classes"
            )
        callbacks.append(callback)
    return callbacks


def load_callback(name: str, where: str) -> Callback:
    """Return a new callback of the class ``name``, such as ``my_module.MyCallback``.

    Its module is looked for in the current directory too. Raises ConfigError, beginning with
    ``where``, where there is no such class or it is not a Callback without arguments.
    """
    module_name, _, class_name = name.rpartition(".")
    if not (module_name and class_name):
        raise ConfigError(f"{where} names '{name}', expected MODULE.CLASS")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        raise ConfigError(
            f"{where} names '{name}', but {module_name} cannot be imported "
            f"({type(error).__name__}: {reason})"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ConfigError(f"{where} names '{name}', but {module_name} has no {class_name}")
    if not (isinstance(found, type) and issubclass(found, Callback)):
        raise ConfigError(f"{where} names '{name}', expected a subclass of pretrain.Callback")
    try:
        return found()
    except TypeError as error:
        raise ConfigError(
            f"{where} names '{name}', which cannot be made without arguments ({error})"
        ) from error
