"""Whether the installed Flower has the names that MaskDM uses beside its public interface; any release may drop them.

Each side lists its own in one module, `private_names`, and checks them before a process of Flower's begins. What is
replaced in Flower must also be looked up there when it is used: of a name that is read no more, or was copied before,
the replacement would change nothing, and nobody would notice.
"""

import ast
import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.metadata import requires, version
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from ..errors import UsageError

UNFIT = 78  # exit code of a process of ours that does not become one of Flower's, for want of a name

Used = Mapping[str, str]  # module → names in it, with spaces between


class Replaced(NamedTuple):
    """A name of a module that is given another value."""

    module: str
    name: str
    by_import_in: str = ""  # the module whose functions import it; "" where those of its own module look it up


def lacking(used: Used, replaced: Iterable[Replaced] = ()) -> list[str]:
    """What the installed Flower does not have, or does not look up any more, in words."""
    wanted = [(module, name) for module, names in used.items() for name in names.split()]
    replaced = list(replaced)
    absent = [
        f"{module}.{name}"
        for module, name in [*wanted, *((each.module, each.name) for each in replaced)]
        if not _has(module, name)
    ]
    unread = [f"a use of {each.module}.{each.name}" for each in replaced if not _is_looked_up(each)]
    return absent or unread


def require(used: Used, replaced: Iterable[Replaced] = ()) -> None:
    """Go on only if the installed Flower has all of them.

    Raises:
        UsageError: names what it lacks, its version, and what to install.
    """
    found = lacking(used, replaced)
    if found:
        raise UsageError(without(*found))


def without(*names: str) -> str:
    """What to say where the installed Flower lacks names."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"Flower {version('flwr')} lacks {names[0]}{more}, which MaskDM needs: pip install '{wanted('flwr')}'"


def wanted(distribution: str) -> Requirement:
    """The versions of a dependency that MaskDM was tested with."""
    return next(found for found in map(Requirement, requires("maskdm") or ()) if found.name == distribution)


def _has(module: str, name: str) -> bool:
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return True


def _is_looked_up(replaced: Replaced) -> bool:
    """Whether a function reads the name at the time of its call, by the text of its module."""
    try:
        text = inspect.getsource(import_module(replaced.by_import_in or replaced.module))
    except (ImportError, OSError, TypeError):
        return False
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return any(_reads(node, replaced) for function in functions for node in ast.walk(function))


def _reads(node: ast.AST, replaced: Replaced) -> bool:
    if replaced.by_import_in:
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        return isinstance(node, ast.ImportFrom) and node.module == replaced.module and replaced.name in names
    return isinstance(node, ast.Name) and node.id == replaced.name and isinstance(node.ctx, ast.Load)
