"""Which names of Flower one side of the house uses beside Flower's public interface, and a Flower without one."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp")


def names_in_use(side: Path) -> set[tuple[str, str]]:
    """Module and name of all that is imported, or reached through an imported module, by the text of a side's files."""
    return {
        (module, name)
        for path in side.rglob("*.py")
        for module, name in _names(ast.parse(path.read_text()))
        if module.split(".")[0] == "flwr" and module not in PUBLIC
    }


def _names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    modules = dict[str, str]()  # by the name that they have in the file
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and isinstance(node.target, ast.Name):
            call = node.value
            if isinstance(call.func, ast.Name) and call.func.id == "import_module":
                assert isinstance(call.args[0], ast.Constant)
                modules[node.target.id] = str(call.args[0].value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr


def without(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    """Take a name out of the installed Flower."""
    first, _, more = name.partition(".")
    if more:
        monkeypatch.setattr(import_module(module), first, SimpleNamespace())
    else:
        monkeypatch.delattr(import_module(module), first)
