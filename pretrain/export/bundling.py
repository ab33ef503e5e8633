"""The source of a model's code: the modules that its layers need, and no others.

An import of a name from a package is followed to the module that the package's ``__init__`` has it
from, and of such an ``__init__`` only those imports are kept, so that a model of one kind of layer
brings the operations of that kind alone.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_PACKAGE = "pretrain"


def bundle(
    names: Iterable[tuple[str, str]],
    *,
    replaced: Mapping[str, Path] | None = None,
    empty: Collection[str] = (),
) -> dict[str, str]:
    """Return the source of every module that ``names``, pairs of a module and a name, need.

    ``replaced`` modules are read from other files, and ``empty`` ones are left empty. Imports for
    type checkers are not followed. Raises ValueError for a module that is not of this package.
    """
    collected = _Bundle(replaced or {}, empty)
    for module, name in names:
        collected.need(module, name)
    return collected.sources()


class _Bundle:
    def __init__(self, replaced: Mapping[str, Path], empty: Collection[str]) -> None:
        self._replaced, self._empty = replaced, empty
        self._modules: dict[str, str] = {}
        self._kept: dict[str, dict[str, ast.ImportFrom]] = {}  # of an __init__, by name

    def sources(self) -> dict[str, str]:
        found = dict(self._modules)
        for module, kept in self._kept.items():
            lines = [_import_line(node, name) for name, node in kept.items()]
            found[module] = "".join(sorted(lines))
        return found

    def need(self, module: str, name: str) -> None:
        """Add what ``from module import name`` runs."""
        path = self._path(module)
        exported = None if path is None else self._exported(module, path)
        if exported is None:
            self._add(module)
            if path is not None and self._path(f"{module}.{name}") is not None:
                self._add(f"{module}.{name}")
            return
        self._add(module)
        kept, node = self._kept[module], exported.get(name)
        if name in kept:
            return
        if node is not None:
            kept[name] = node
        if node is None or node.module == module:
            self._add(f"{module}.{name}")  # a module inside of it
            return
        original = next(a.name for a in node.names if (a.asname or a.name) == name)
        self.need(str(node.module), original)

    def _add(self, module: str) -> None:
        if module in self._modules or module in self._kept:
            return
        self._add_parents(module)
        path = self._path(module)
        if path is None:
            if module not in self._empty:
                raise ValueError(f"there is no module {module}")
            self._modules[module] = ""
            return
        if self._exported(module, path) is not None:
            self._kept.setdefault(module, {})
            return
        source = path.read_text(encoding="utf-8")
        self._modules[module] = source
        for node in imports(source, run=True):
            for alias in node.names:
                self.need(str(node.module), alias.name)

    def _add_parents(self, module: str) -> None:
        parent = module.rpartition(".")[0]
        if parent:
            self._add(parent)

    def _path(self, module: str) -> Path | None:
        """Return the file of a module; None where it is left empty or does not exist."""
        if module in self._replaced:
            return self._replaced[module]
        if module.split(".", maxsplit=1)[0] != _PACKAGE:
            raise ValueError(f"{module} is not a module of {_PACKAGE}")
        if module in self._empty:
            return None
        path = _ROOT.joinpath(*module.split("."))
        for found in (path.with_suffix(".py"), path / "__init__.py"):
            if found.is_file():
                return found
        return None

    def _exported(self, module: str, path: Path) -> dict[str, ast.ImportFrom] | None:
        """Return the imports of an ``__init__`` that holds nothing else, by name, or None."""
        if path.name != "__init__.py" or module in self._replaced:
            return None
        found: dict[str, ast.ImportFrom] = {}
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                found |= {alias.asname or alias.name: node for alias in node.names}
            elif not _is_text(node) and not _is_all(node):
                return None
        return found


def imports(source: str, *, run: bool = False) -> Iterator[ast.ImportFrom]:
    """Yield the imports of modules of ours, those inside functions included.

    ``run``: without those for type checkers, which are never run. Raises ValueError for an import
    of a form that cannot be moved.
    """
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if run and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno} has a relative import")
            if (node.module or "").split(".")[0] == _PACKAGE:
                yield node
        elif isinstance(node, ast.Import) and any(
            alias.name.split(".")[0] == _PACKAGE for alias in node.names
        ):
            raise ValueError(f"line {node.lineno}: expected 'from {_PACKAGE}... import'")
        pending += ast.iter_child_nodes(node)


def moved_into(package: str, source: str) -> str:
    """Return the source with its imports of ours from inside ``package``."""
    lines = source.splitlines(keepends=True)
    for node in imports(source):
        before, found, after = lines[node.lineno - 1].partition(f"from {_PACKAGE}")
        if not found:
            raise ValueError(f"line {node.lineno} does not begin with 'from {_PACKAGE}'")
        lines[node.lineno - 1] = f"{before}from {package}.{_PACKAGE}{after}"
    return "".join(lines)


def _import_line(node: ast.ImportFrom, name: str) -> str:
    alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
    renamed = f" as {alias.asname}" if alias.asname else ""
    return f"from {node.module} import {alias.name}{renamed}\n"


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
